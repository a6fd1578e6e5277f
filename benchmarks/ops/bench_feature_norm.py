"""feature_norm: the selected experts' tokens on the base grid and normalised, against the official steps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.ops import bench_feature_resample as resample
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels.ops import feature_norm


def inputs(case: Case, draw: Draw) -> Inputs:
    return resample.inputs(case, draw)


def official(t: Inputs) -> list[Tensor]:
    """The official steps without the affine part, which belongs to a block."""
    return [F.layer_norm(f, f.shape[-1:]) for f in resample.official(t)]


def channels_last(t: Inputs) -> list[Tensor]:
    return [F.layer_norm(f, f.shape[-1:]) for f in resample.channels_last(t)]


def ours(t: Inputs, backend: str) -> list[Tensor]:
    size = (t.side, t.side)
    return list(feature_norm(t.features, t.grids, size, [None] * len(t.features), backend=backend))


BASELINES = [Variant("official", official), Variant("channels last", channels_last)]
CASES = cases.STAGES + cases.ONE_THREAD
SUITE = Suite(__name__, "feature_norm", CASES, inputs, BASELINES, lambda case: Work(), op=ours)
test_speed = speed_test(SUITE)
