"""The dense product of the adapter's layers on a CPU, against torch's: the feed-forward's first layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mova_kernels._linear import linear

from . import cases
from .cases import Case
from .speed_test import speed_test
from .suite import Draw, Inputs, Suite, Variant, Work


def inputs(case: Case, draw: Draw) -> Inputs:
    hidden = int(case.width * 8 / 3)
    leaves = [draw(case.samples, case.config.num_tokens, case.width), draw(hidden, case.width), draw(hidden)]
    return Inputs(leaves=leaves, reads=leaves)


def official(t: Inputs) -> Tensor:
    return F.linear(*t.leaves)


def ours(t: Inputs) -> Tensor:
    return linear(*t.leaves)


def work(case: Case) -> Work:
    return Work(2 * case.samples * case.config.num_tokens * case.width * int(case.width * 8 / 3))


SUITE = Suite(
    __name__, "linear", cases.STAGES, inputs, [Variant("official", official)], work, truth=official,
    ours=[Variant("mova_kernels", ours, ours=True)],
)  # fmt: skip
test_speed = speed_test(SUITE)
