"""Launch configurations of Triton kernels: tiles, warps and stages. For ``triton_impl.py`` files only.

A launch takes what was shipped for the GPU (``tuned/<device>.json``), or the default that stands beside the kernel. It
searches only if ``MOVA_KERNELS_AUTOTUNE`` is set, at the first launch with a key that is not known yet, and never
while a CUDA graph is captured. That launch then takes seconds to minutes, synchronises, and prints what it found.
``MOVA_KERNELS_AUTOTUNE=1`` forgets it when the process ends; a directory keeps it, in ``<directory>/<device>.json``,
where the next process finds it and from where it can be shipped.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

VARIABLE = "MOVA_KERNELS_AUTOTUNE"
SHIPPED = Path(__file__).parents[1] / "tuned"

Config = tuple[int, ...]


def bucket(size: int) -> int:
    """The power of two at or above ``size``: sizes that share a configuration."""
    return 1 << max(size - 1, 0).bit_length()


def tuned(
    op: str,
    kernel: str,
    key: tuple[object, ...],
    default: Config,
    candidates: Iterable[Config],
    launch: Callable[[Config], object],
    device: torch.device,
) -> Config:
    """The configuration for a launch of ``kernel``.

    Args:
        key: the values that it depends on, such as the dtype, widths, and sizes that went through :func:`bucket`.
        candidates: what a search tries besides the default. They must be correct, but need not fit every GPU.
        launch: runs the kernel with a configuration; it is called many times, so it must write the same every time.
        device: of the tensors.
    """
    request = os.environ.get(VARIABLE, "0")
    known = _known(device_name(device), request)
    search = request not in ("", "0")
    if not known and not search:
        return default
    name = " ".join(map(str, (op, kernel, *key)))
    if search and name not in known and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        known[name] = _search(name, default, candidates, launch)
        if request != "1":
            _save(_file(Path(request), device_name(device)), known)
    return known.get(name, default)


@functools.cache
def device_name(device: torch.device) -> str | None:
    """The GPU's name as in ``tuned/<device>.json``, such as NVIDIA-H200; None for other devices."""
    if device.type != "cuda":
        return None
    return "-".join(torch.cuda.get_device_name(device).replace("/", " ").split())


@functools.cache
def _known(device: str | None, request: str) -> dict[str, Config]:
    """Configurations by name, shipped and found before; a search adds to them."""
    folders = [SHIPPED] if request in ("", "0", "1") else [SHIPPED, Path(request)]
    return {name: config for folder in folders for name, config in _load(_file(folder, device)).items()}


def _file(folder: Path, device: str | None) -> Path:
    return folder / f"{device}.json"


def _load(file: Path) -> dict[str, Config]:
    if not file.exists():
        return {}
    return {name: tuple(config) for name, config in json.loads(file.read_text()).items()}


def _save(file: Path, configs: dict[str, Config]) -> None:
    """Add configurations to the file, one per line. It is replaced atomically, so readers never see half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(config)}" for name, config in sorted({**_load(file), **configs}.items())]
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(file)


def _search(name: str, default: Config, candidates: Iterable[Config], launch: Callable[[Config], object]) -> Config:
    times: dict[Config, float] = {}
    for config in dict.fromkeys([default, *candidates]):
        try:
            times[config] = _milliseconds(functools.partial(launch, config))
        except Exception as error:  # too large for this GPU, or for this compiler
            print(f"{VARIABLE}: {name}: {config} does not run: {error}", file=sys.stderr)
    best = min(times, key=times.__getitem__, default=default)
    if times:
        print(f"{VARIABLE}: {name}: {best}, {times[best]:.4g} ms", end="; ", file=sys.stderr)
        print(f"default {default}, {times.get(default, float('nan')):.4g} ms", file=sys.stderr)
    return best


def _milliseconds(launch: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(launch, warmup=10, rep=50, return_mode="median")
