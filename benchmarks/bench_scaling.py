"""The adapter's time by the number of samples, of experts per sample, of experts and of tokens, and by routing."""

from __future__ import annotations

from . import cases
from .baselines import ADAPTER
from .bench_adapter import inputs, matches_golden_numbers, on_backends, ours, truth, work
from .speed_test import speed_test
from .suite import Suite

BASELINES = [variant for variant in ADAPTER if variant.name in ("official", "ragged + SDPA")]
SUITE = Suite(
    __name__, "scaling", cases.SCALING, inputs, BASELINES, work,
    ours=on_backends(ours), truth=truth, verify=matches_golden_numbers,
)  # fmt: skip
test_speed = speed_test(SUITE)
