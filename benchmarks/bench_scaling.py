"""How the adapter's time grows with samples, experts per sample, experts and tokens, and how it depends on routing."""

from __future__ import annotations

from . import cases
from .baselines import LADDER
from .bench_adapter import inputs, matches_golden_numbers, on_backends, ours, truth, work
from .suite import Suite

BASELINES = [variant for variant in LADDER if variant.name in ("official", "ragged + SDPA")]
SUITE = Suite(
    "scaling",
    cases.SCALING,
    inputs,
    BASELINES,
    work,
    ours=on_backends(ours),
    truth=truth,
    verify=matches_golden_numbers,
)
test_speed = SUITE.test()
