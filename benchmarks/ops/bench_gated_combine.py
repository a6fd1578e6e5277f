"""gated_combine: LayerNorm, output projection and gate of the selected pairs, added to the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels import RaggedPairs
from mova_kernels.dense_reference import NORM_EPS
from mova_kernels.ops import gated_combine


def inputs(case: Case, draw: Draw) -> Inputs:
    tokens, width, experts = case.config.num_tokens, case.width, case.experts
    pairs = RaggedPairs.from_routing(case.selected, device=draw.device)
    x, attended = draw(case.samples, tokens, width), draw(pairs.num_pairs, tokens, width)
    norms = [(draw(width, scale=0.1, shift=1), draw(width, scale=0.1)) for _ in range(experts)]
    weights = [draw(width, width, scale=width**-0.5) for _ in range(experts)]
    biases = [draw(width, scale=0.1) for _ in range(experts)]
    gate = torch.rand(pairs.num_pairs, generator=torch.Generator().manual_seed(2)).to(draw.device)
    gate = gate.double() if x.dtype == torch.float64 else gate
    used = case.selected.any(0).nonzero().flatten().tolist()
    leaves = [x, attended, gate, *(t for e in used for t in (*norms[e], weights[e], biases[e]))]
    return Inputs(
        x=x, attended=attended, gate=gate, norms=norms, weights=weights, biases=biases, pairs=pairs,
        leaves=leaves, reads=leaves,
    )  # fmt: skip


def official(t: Inputs) -> Tensor:
    """The official steps, for the selected pairs only."""
    out, (offsets, sample) = t.x, (t.pairs.host_offsets, t.pairs.sample)
    for e, (g, b) in enumerate(t.norms):
        rows = slice(offsets[e], offsets[e + 1])
        if rows.start < rows.stop:
            normed = F.layer_norm(t.attended[rows], g.shape, g, b, NORM_EPS)
            weighted = t.gate[rows, None, None].to(out.dtype) * F.linear(normed, t.weights[e], t.biases[e])
            out = out.index_add(0, sample[rows], weighted)
    return out


def ours(t: Inputs, backend: str) -> Tensor:
    return gated_combine(t.x, t.attended, t.gate, t.pairs, t.norms, t.weights, t.biases, backend=backend)


def work(case: Case) -> Work:
    return Work(2 * int(case.selected.sum()) * case.config.num_tokens * case.width**2)


SUITE = Suite(__name__, "gated_combine", cases.STAGES, inputs, [Variant("official", official)], work, op=ours)
test_speed = speed_test(SUITE)
