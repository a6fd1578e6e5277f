"""rope2d: rotary embedding of the selected pairs' queries, against the official formula."""

from __future__ import annotations

from torch import Tensor

from benchmarks import baselines, cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels.dense_reference import rope_tables
from mova_kernels.ops import rope2d, rope2d_table


def inputs(case: Case, draw: Draw) -> Inputs:
    config = case.config
    x = draw(int(case.selected.sum()), config.num_tokens, config.num_heads, config.head_channels)
    rounded = [draw.cast(t)[:, None] for t in rope_tables(config, "cpu", x.dtype)]
    cos, sin = rope2d_table(config.resolution, config.head_channels, device=draw.device)
    return Inputs(x=x, rounded=rounded, cos=cos, sin=sin, leaves=[x], reads=[x, cos, sin])


def official(t: Inputs) -> Tensor:
    return baselines.rotate(t.x, t.rounded)


def ours(t: Inputs, backend: str) -> Tensor:
    return rope2d(t.x, t.cos, t.sin, backend=backend)


SUITE = Suite(__name__, "rope2d", cases.STAGES, inputs, [Variant("official", official)], lambda case: Work(), op=ours)
test_speed = speed_test(SUITE)
