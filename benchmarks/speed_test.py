"""The pytest function of a suite. It gives the times that a race has measured to pytest-benchmark.

pytest-benchmark measures one function after the other, but the variants of a case have to take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import machine
from .cases import Case
from .result import Result
from .suite import Suite

_now = 0.0


def speed_test(suite: Suite) -> Callable[..., None]:
    """The pytest function that measures every variant of a suite on every case."""

    @pytest.mark.benchmark(timer=clock)
    @pytest.mark.parametrize("variant", suite.variants)
    @pytest.mark.parametrize("case", suite.cases, ids=str)
    def test_speed(benchmark: Any, races: Any, case: Case, variant: str) -> None:
        record(benchmark, suite, case, variant, races(suite, case)[variant])

    return test_speed


def clock() -> float:
    """The timer of all these tests. It advances by measured times only."""
    return _now


def record(benchmark: Any, suite: Suite, case: Case, variant: str, result: Result) -> None:
    """Make ``result`` that of this test: its times with their description, or a skip or failure with the reason."""
    if result.outcome == "skipped":
        benchmark.skipped = True
        pytest.skip(result.reason)
    if result.outcome == "failed":
        benchmark.skipped = True
        pytest.fail(result.reason, pytrace=False)
    benchmark.group = f"{suite.name} {case}"
    benchmark.extra_info.update(describe(suite, case, variant, result))
    times = iter(result.seconds)

    def one_round() -> None:
        global _now
        _now += next(times)

    benchmark.pedantic(one_round, rounds=len(result.seconds))


def describe(suite: Suite, case: Case, variant: str, result: Result) -> dict[str, Any]:
    """The description of a measurement, without its times, in JSON's types."""
    flop, exps = suite.work(case).of(case.direction)
    seconds = result.median
    peaks = machine.peaks(result.device)
    rate = peaks["flops"].get(case.dtype)
    floors = [result.moved / peaks["bandwidth"], exps / peaks["exps"], *([flop / rate] if rate else [])]
    names = list(suite.variants)
    return {
        "suite": suite.name,
        "case": str(case),
        "variant": variant,
        "kind": "ours" if suite.variants[variant].ours else "baseline",
        "plain": variant == names[0],
        **{key: getattr(case, key) for key in ("samples", "picks", "experts", "side", "width", "dtype", "direction")},
        "routing": case.routing,
        "blocks": case.blocks,
        "threads": result.threads,
        "device": result.device,
        "flop": flop or None,
        "bytes": result.moved,
        "exps": exps or None,
        "tflops": flop / seconds / 1e12 if flop else None,
        "peak_share": flop / rate / seconds if flop and rate else None,
        "roofline_share": max(floors) / seconds,
        "memory": result.memory,
        "error": result.error,
        "gradient_error": result.gradient_error,
        "launches": result.launches,
        "syncs": result.syncs,
        "note": result.note,
    }
