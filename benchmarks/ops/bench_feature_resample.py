"""feature_resample: the selected experts' tokens on the base grid, against the official steps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels.dense_reference import feature_align
from mova_kernels.ops import feature_resample


def inputs(case: Case, draw: Draw) -> Inputs:
    """Packed features of each selected expert."""
    counts = case.selected.sum(0).tolist()
    per_expert = list(zip(counts, case.grids, case.config.expert_channels, strict=True))
    features = [draw(n, h * w, c) for n, (h, w), c in per_expert if n]
    grids = [grid for n, grid, _ in per_expert if n]
    return Inputs(features=features, grids=grids, side=case.side, leaves=features, reads=features)


def official(t: Inputs) -> list[Tensor]:
    return [feature_align(f, grid, t.side) for f, grid in zip(t.features, t.grids, strict=True)]


def channels_last(t: Inputs) -> list[Tensor]:
    """Without the official copies. It rounds once, as the official steps do."""
    out = []
    for f, grid in zip(t.features, t.grids, strict=True):
        image = f.unflatten(1, grid).permute(0, 3, 1, 2)
        out.append(F.interpolate(image, (t.side, t.side), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2))
    return out


def ours(t: Inputs, backend: str) -> list[Tensor]:
    size = (t.side, t.side)
    return [feature_resample(f, grid, size, backend=backend) for f, grid in zip(t.features, t.grids, strict=True)]


BASELINES = [Variant("official", official), Variant("channels last", channels_last)]
SUITE = Suite(__name__, "feature_resample", cases.STAGES, inputs, BASELINES, lambda case: Work(), op=ours)
test_speed = speed_test(SUITE)
