"""ragged_linear: keys and values of the selected pairs. The experts are frozen, as in MoVA's training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels import RaggedPairs
from mova_kernels.ops import ragged_linear


def inputs(case: Case, draw: Draw) -> Inputs:
    """Normalised features of each expert on the base grid, packed, and the parameters of their projections."""
    tokens, width, widths = case.config.num_tokens, case.width, case.config.expert_channels
    counts = case.selected.sum(0).tolist()
    features = [draw(n, tokens, c) for n, c in zip(counts, widths, strict=True)]
    affines = [(draw(c, scale=0.1, shift=1), draw(c, scale=0.1)) for c in widths]
    keys, values = ([draw(width, c, scale=c**-0.5) for c in widths] for _ in range(2))
    leaves = [p for n, *p in zip(counts, keys, values, strict=True) if n for p in p]
    leaves += [p for n, affine in zip(counts, affines, strict=True) if n for p in affine]
    return Inputs(
        features=features, affines=affines, keys=keys, values=values, counts=counts, leaves=leaves,
        reads=[*features, *leaves], pairs=RaggedPairs.from_routing(case.selected, device=draw.device),
    )  # fmt: skip


def official(t: Inputs) -> list[Tensor]:
    """The official steps, for the selected pairs only."""
    normed = [f * g + b for f, (g, b) in zip(t.features, t.affines, strict=True)]
    both = (t.keys, t.values)
    used = [e for e, n in enumerate(t.counts) if n]
    return [torch.cat([F.linear(normed[e], weights[e]) for e in used]) for weights in both]


def ours(t: Inputs, backend: str) -> list[Tensor]:
    return list(ragged_linear(t.features, t.pairs, t.affines, [t.keys, t.values], backend=backend))


def work(case: Case) -> Work:
    """The features get no gradients, so the backward pass has one product for each of the forward pass."""
    pairs = sum(n * c for n, c in zip(case.selected.sum(0).tolist(), case.config.expert_channels, strict=True))
    return Work(2 * 2 * pairs * case.config.num_tokens * case.width, backward=1)


SUITE = Suite(__name__, "ragged_linear", cases.STAGES, inputs, [Variant("official", official)], work, op=ours)
test_speed = speed_test(SUITE)
