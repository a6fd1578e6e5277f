"""Measures the variants of a case in turn, so that slow phases of the machine affect all of them alike."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import DTYPES, Case
from .result import Result
from .runner import LocalRunner, RemoteRunner
from .suite import Suite

ROUNDS = (5, 50)
SLOW_ROUNDS = 3  # at least, where a round of all variants takes more than SLOW_SECONDS
SLOW_SECONDS = 10.0

Start = Callable[[str, Case, "str | None", torch.device], Any]  # module of the suite, case, variant, device -> a runner


def race(
    suite: Suite,
    case: Case,
    names: Sequence[str],
    device: torch.device,
    seconds: float,
    quick: bool = False,
    start: Start | None = None,
) -> dict[str, Result]:
    """Measure the named variants. All rounds together take about ``seconds``, but there is a least number of rounds.

    No time is reported of a variant with wrong results. Its error against fp64 may be at most twice that of the
    official computation in the same dtype, which runs for that even if it is not named. If the official computation
    cannot run, the first variant that can takes its place.

    ``start`` makes the runner of a variant. The default: on a CPU every variant has a process of its own, because the
    leftovers of another one in the allocator (huge pages, a grown heap) change its speed by up to a factor of two. On a
    GPU all variants share this process and its allocator.
    """
    if case.on_gpu and device.type != "cuda":
        return {name: Result("skipped", device.type, "it takes a GPU: hours on a CPU") for name in names}
    if device.type == "cuda" and not torch.cuda.is_available():
        return {name: Result("skipped", device.type, "there is no CUDA device") for name in names}
    start = start or (LocalRunner if device.type == "cuda" else RemoteRunner)
    official = next(iter(suite.variants))
    results: dict[str, Result] = {}
    runners: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        truth = Path(folder, "truth")
        try:
            runners["truth"] = start(suite.module, case, None, device)
            try:
                runners["truth"].write_truth(truth)
            except Exception as error:
                reason = f"nothing to check against: {type(error).__name__}: {error}"
                return {name: Result("failed", device.type, reason) for name in names}
            runners.pop("truth").close()
            for name in dict.fromkeys([official, *names]):
                variant = suite.variants[name]
                reason = variant.declines(case, device)
                if quick and not variant.quick:
                    results[name] = Result("skipped", device.type, "only with --full")
                elif reason:
                    results[name] = Result("skipped", device.type, reason)
                else:
                    runners[name] = start(suite.module, case, name, device)
                    try:
                        results[name] = runners[name].prepare(truth)  # with the seconds of one call
                    except Exception as error:
                        results[name] = _of_error(error, device)
                        runners.pop(name).close()
            _judge(results, case)
            for name in list(runners):
                if name not in names or results[name].outcome != "measured":
                    runners.pop(name).close()
            once = sum(results[name].seconds.pop() for name in runners)
            least = SLOW_ROUNDS if once > SLOW_SECONDS else ROUNDS[0]
            rounds = min(max(int(seconds / max(once, 1e-9)), least), ROUNDS[1])
            for _ in range(rounds):
                for name, runner in list(runners.items()):
                    try:
                        results[name].seconds += runner.round()
                    except Exception as error:
                        results[name] = _of_error(error, device)
                        runners.pop(name).close()
        finally:
            for runner in runners.values():
                runner.close()
    return {name: results[name] for name in names}


def _of_error(error: Exception, device: torch.device) -> Result:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return Result("skipped", device.type, f"out of memory: {str(error).partition('.')[0]}")
    return Result("failed", device.type, f"{type(error).__name__}: {error}")


def _judge(results: dict[str, Result], case: Case) -> None:
    """Results that are less exact than twice the error of the official computation become failures."""
    measured = [r for r in results.values() if r.outcome == "measured"]
    rounding = torch.finfo(DTYPES[case.dtype]).eps / 2  # of an exact result; the official error may be less by chance
    for result in measured:
        for kind in ("error", "gradient_error"):
            error, official = getattr(result, kind), getattr(measured[0], kind)
            if error is not None and not error <= 2 * official + rounding:
                result.outcome = "failed"
                result.reason = f"wrong: {kind} {error:.3g} against fp64, of the official computation {official:.3g}"
