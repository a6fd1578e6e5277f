"""Whether Triton kernels can run: on a GPU, or on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ..backends import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 6)
# Triton 3.6's interpreter truncates where a GPU rounds to bfloat16, and multiplies its bits as integers.
INTERPRETED_DTYPES = (torch.float32, torch.float16)


def declines(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a Triton kernel cannot run on tensors of this device and dtype, or None."""
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if torch.compiler.is_compiling():  # the checks below cannot be traced; the raw op makes them when it runs
        could = device.type == "cuda" or _interpreter_is_on()
        return None if could else f"it runs on cuda tensors, not on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (version := _version()) and version < OLDEST:
        return f"it needs triton {'.'.join(map(str, OLDEST))}, not {'.'.join(map(str, version))}"
    if device.type == "cpu" and _interpreted():
        return None if dtype in INTERPRETED_DTYPES else f"triton's interpreter computes {dtype} wrongly"
    if device.type != "cuda":
        return f"it runs on cuda tensors, not on {device.type} (TRITON_INTERPRET=1 was not set at triton's import)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = _capability(device)
    return f"it needs compute capability 8.0, {device} has {capability}" if capability < (8, 0) else None


@functools.cache
def _version() -> tuple[int, ...]:
    """Major and minor version of triton."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


@functools.cache  # asking torch takes longer than everything else together
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _interpreter_is_on() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _interpreted() -> bool:
    """Whether triton decorated its own functions for the interpreter; the kernels' must be of the same kind."""
    import triton
    import triton.language as tl

    return not isinstance(tl.cdiv, triton.JITFunction)


def _interpreter_only(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "triton's interpreter is for tests"


BACKEND = Backend(
    "triton",
    declines,
    only_when_asked=_interpreter_only,
    caution="mova_kernels runs Triton kernels that have not yet been tested on a GPU, see docs/gpu-status.md; "
    "MOVA_KERNELS_BACKEND=reference avoids them",
)
