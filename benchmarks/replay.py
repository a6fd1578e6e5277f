"""Hands measured times to pytest-benchmark, which cannot interleave what it measures itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from . import machine

if TYPE_CHECKING:
    from .cases import Case
    from .race import Result
    from .suite import Suite

_now = 0.0


def clock() -> float:
    """The timer of all our benchmarks: it advances only by what was measured."""
    return _now


def hold(benchmark: Any, suite: Suite, case: Case, variant: str, result: Result) -> None:
    """Make ``result`` that of this test: its times with everything about them, or a skip or failure with the reason."""
    if result.outcome == "skipped":
        benchmark.skipped = True
        pytest.skip(result.reason)
    if result.outcome == "failed":
        benchmark.skipped = True
        pytest.fail(result.reason, pytrace=False)
    benchmark.group = f"{suite.name} {case}"
    benchmark.extra_info.update(describe(suite, case, variant, result))
    times = iter(result.seconds)

    def play() -> None:
        global _now
        _now += next(times)

    benchmark.pedantic(play, rounds=len(result.seconds))


def describe(suite: Suite, case: Case, variant: str, result: Result) -> dict[str, Any]:
    """Everything about a measurement but its times, in JSON's types."""
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
