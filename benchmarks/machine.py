"""The machine that measures: its name, its limits as measured on the spot, and the versions of the software."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mova_kernels
from mova_kernels import _compiled
from mova_kernels._linear import product
from mova_kernels.info import cpu_name

SECONDS = 0.3  # for each limit


@functools.cache
def peaks(device: str) -> dict[str, Any]:
    """The best rates that this machine was seen to reach. A benchmark's share of the peak refers to them.

    Returns:
        "flops": per dtype, FLOP/s of a large matrix product, the better one of torch's and ours; "bandwidth": bytes/s
        read and written by a copy; "exps": exponentials/s of an array in the cache.
    """
    side = 8192 if device == "cuda" else 2048
    flops = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if device == "cpu" and dtype == torch.float16:
            continue
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        candidates = [lambda a=a, b=b: a @ b]
        if device == "cpu":
            candidates.append(lambda a=a, b=b: product(a, b.T))
        flops[name] = 2 * side**3 / min(shortest_seconds(c, device) for c in candidates)
    source = torch.randn(1 << (28 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    cached = torch.randn(1 << (24 if device == "cuda" else 17), device=device)
    out = torch.empty_like(cached)
    return {
        "flops": flops,
        "bandwidth": 2 * source.nbytes / shortest_seconds(lambda: target.copy_(source), device),
        "exps": cached.numel() / shortest_seconds(lambda: torch.exp(cached, out=out), device),
    }


def describe(device: str) -> dict[str, Any]:
    """Name, threads, clock and limits."""
    return {
        "name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "device": device,
        "threads": torch.get_num_threads(),
        "clock_mhz": clock_mhz(device),
        "peaks": peaks(device),
    }


def versions() -> dict[str, str]:
    """The versions of all software that affects the speed."""
    found = {
        "mova_kernels": mova_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": _compiled.build_info().get("compiler", "not built"),
        "instruction set": "none" if _compiled.cpu_reason() else _compiled.cpu_isa(),
        "kernel": platform.release(),
    }
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def shortest_seconds(call: Callable[[], object], device: str) -> float:
    """The shortest time of a call."""
    call()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def clock_mhz(device: str) -> float | None:
    """The current clock; None where the system does not tell."""
    if device == "cuda":
        gpu = f"GPU-{torch.cuda.get_device_properties().uuid}"
        query = ["nvidia-smi", "-i", gpu, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            return float(subprocess.run(query, capture_output=True, text=True, timeout=20).stdout)
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return None
    path = Path("/proc/cpuinfo")
    found = re.findall(r"^cpu MHz\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else []
    return max(map(float, found), default=None)
