"""Whether Triton kernels can run: on a GPU, or on CPU tensors in Triton's interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import importlib.util

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED_DTYPES = (
    torch.float32,
    torch.float16,
)  # Triton 3.6's interpreter truncates bfloat16 and multiplies its bits


@torch.compiler.assume_constant_result
def declines(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a Triton kernel cannot run on tensors of this device and dtype, or None. Imports Triton."""
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton
    import triton.language as tl

    # Triton reads TRITON_INTERPRET when its own functions are decorated, and its language must agree with our kernels.
    interpreted = not isinstance(tl.cdiv, triton.JITFunction)
    if device.type == "cpu" and interpreted:
        return None if dtype in INTERPRETED_DTYPES else f"triton's interpreter computes {dtype} wrongly"
    if device.type != "cuda":
        return f"it runs on cuda tensors, not on {device.type} (TRITON_INTERPRET=1 was not set at triton's import)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, {device} has {torch.cuda.get_device_capability(device)}"
    return None
