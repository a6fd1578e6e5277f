"""What is installed here and what runs: behind ``python -m mova_kernels``, and for bug reports."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import _compiled, backends
from ._version import __version__


def collect() -> dict[str, Any]:
    """Sections "versions", "cpu", "cuda", "native", "environment" and "backends", of plain JSON values.

    A probe that fails leaves the text of its error in its place.
    """
    return {
        "versions": {
            "mova_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _probe(_triton_version),
            "huggingface_hub": _probe(lambda: importlib.metadata.version("huggingface_hub")),
            "os": _probe(platform.platform),
        },
        "cpu": {
            "name": _probe(cpu_name),
            "threads": torch.get_num_threads(),
            "instruction sets": _probe(lambda: ", ".join(_compiled.cpu_isas())),
            "chosen": _probe(_compiled.cpu_isa),
        },
        "cuda": _probe(_cuda),
        "native": {
            "build": _probe(_compiled.build_info),
            "cpu library": _probe(lambda: _compiled.cpu_reason() or "usable"),
            "cuda library": _probe(lambda: _compiled.cuda_reason() or "usable"),
        },
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MOVA_")},
        "backends": _probe(_backends),
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main(args: argparse.Namespace) -> None:
    """Print :func:`collect` as text, or as JSON with ``--json``."""
    sections = collect()
    print(json.dumps(sections, indent=2) if args.json else "\n".join(_lines(sections)))


def _probe(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _triton_version() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ModuleNotFoundError:
        return "not installed"


def _cuda() -> dict[str, Any] | str:
    if not torch.cuda.is_available():
        built = "no device is available" if torch.backends.cuda.is_built() else "this PyTorch is built without it"
        return f"none: {built}"
    answer: dict[str, Any] = {"runtime": torch.version.cuda, "driver": _probe(_driver_version)}
    for index in range(torch.cuda.device_count()):
        answer[f"cuda:{index}"] = _probe(partial(_cuda_device, index))
    return answer


def _cuda_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, capability {properties.major}.{properties.minor}, {properties.total_memory >> 30} GiB"


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")[0]


def _backends() -> dict[str, Any]:
    """Per device with its usual dtype, per op: every backend, and "runs" or the reason why it does not."""
    present = {"cpu, float32": ("cpu", torch.float32)}
    if torch.cuda.is_available():
        present["cuda, bfloat16"] = ("cuda", torch.bfloat16)
    return {name: _probe(partial(backends.explain, *where)) for name, where in present.items()}


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    width = max((len(key) for key, entry in value.items() if not isinstance(entry, dict)), default=0)
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict):
            lines += [f"{indent}{key}", *(_lines(entry, indent + "  ") or [f"{indent}  (none)"])]
        else:
            text = ", ".join(map(str, entry)) if isinstance(entry, list) else str(entry)
            lines.append(f"{indent}{key:{width}}  {text}")
    return lines
