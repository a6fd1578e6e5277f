"""One block of the adapter, without the steps that run once per forward: resampling, and our normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from mova_kernels._inputs import aligned, checked
from mova_kernels.dense_reference import feature_align

from . import bench_adapter, cases
from .baselines import ADAPTER
from .bench_adapter import block_flop, exps, matches_golden_numbers, on_backends, truth
from .cases import Case
from .speed_test import speed_test
from .suite import Draw, Inputs, Suite, Work


def inputs(case: Case, draw: Draw) -> Inputs:
    """The inputs of the adapter, and the features on the base grid."""
    t = bench_adapter.inputs(case, draw)
    t.aligned = [feature_align(f, grid, case.side) for f, grid in zip(t.experts, t.grids, strict=True)]
    t.normalised = None
    t.leaves = [t.base, *t.module.blocks[0].parameters()]
    return t


def ours(t: Inputs) -> Tensor:
    """The module. The first call also does the steps of a forward before its blocks, as the backend needs them."""
    if t.normalised is None:
        with torch.no_grad():
            given = checked(t.config, t.base, t.base, t.experts, t.selected, t.text, t.grids)
            t.normalised = aligned(given, (t.config.resolution, t.config.resolution), t.base.device, normalise=True)
    return t.module.blocks[0](t.base, t.text, *t.normalised, *t.module.rope.tables(t.base))


def work(case: Case) -> Work:
    forward, backward = block_flop(case)
    return Work(forward, exps(case), backward / forward)


NAMES = ("official", "ragged + SDPA")
BASELINES = [variant for variant in ADAPTER if variant.name in NAMES]
SUITE = Suite(
    __name__, "block", cases.BLOCK, inputs, BASELINES, work,
    ours=on_backends(ours), truth=truth, verify=matches_golden_numbers,
)  # fmt: skip
test_speed = speed_test(SUITE)
