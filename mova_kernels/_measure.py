"""Time and peak memory of a computation, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Measurement:
    """The result of :func:`measure`.

    Attributes:
        output: of the last pass.
        seconds: the median time of a pass.
        peak_bytes: the peak beyond what was in use before; None where the system cannot tell.
    """

    output: Any
    seconds: float
    peak_bytes: int | None


def measure(compute: Callable[[], Any], device: torch.device, warm_up: int = 0, timed: int = 1) -> Measurement:
    """Run ``compute`` ``warm_up`` times, then ``timed`` times with a clock."""
    for _ in range(warm_up):
        compute()
    before = _reset_peak(device)
    times = []
    for _ in range(timed):
        start = time.perf_counter()
        output = compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return Measurement(output, statistics.median(times), None if before is None else _peak(device) - before)


def _reset_peak(device: torch.device) -> int | None:
    """Bytes in use now, from which :func:`_peak` rises; None where the system cannot tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # The allocator keeps memory that an earlier computation has freed; that would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A size from /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
