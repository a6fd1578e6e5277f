"""swiglu_norm: the elementwise middle of the feed-forward and its LayerNorm, against the official steps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels.dense_reference import NORM_EPS
from mova_kernels.ops import swiglu_norm


def inputs(case: Case, draw: Draw) -> Inputs:
    hidden = int(case.width * 8 / 3)
    gate, up = (draw(case.samples, case.config.num_tokens, hidden) for _ in range(2))
    leaves = [gate, up, draw(hidden, scale=0.1, shift=1), draw(hidden, scale=0.1)]
    return Inputs(leaves=leaves, reads=leaves)


def official(t: Inputs) -> Tensor:
    gate, up, weight, bias = t.leaves
    return F.layer_norm(F.silu(gate) * up, weight.shape, weight, bias, NORM_EPS)


def ours(t: Inputs, backend: str) -> Tensor:
    return swiglu_norm(*t.leaves, NORM_EPS, backend=backend)


def work(case: Case) -> Work:
    return Work(exps=case.samples * case.config.num_tokens * int(case.width * 8 / 3))


SUITE = Suite(__name__, "swiglu_norm", cases.STAGES, inputs, [Variant("official", official)], work, op=ours)
test_speed = speed_test(SUITE)
