"""feature_resample in CUDA C++: as cpu_impl.py, on torch's current stream of the tensor's device."""

from __future__ import annotations

from torch import Tensor

from ... import _compiled
from .cpu_impl import NUMBERS, TENSORS, backward_operands, fields, forward_operands

_fwd = _compiled.function("mk_feature_resample_cuda_fwd", TENSORS, f"{NUMBERS} device stream:uint64", "cuda")
_bwd = _compiled.function("mk_feature_resample_cuda_bwd", TENSORS, f"{NUMBERS} device stream:uint64", "cuda")


def forward(x: Tensor, rows: Tensor | None, in_size: list[int], out_size: list[int]) -> Tensor:
    """(R, h*w, C), (M,) int64 or None -> (M, H*W, C), contiguous."""
    x, rows, y = forward_operands(x, rows, out_size)
    device = x.get_device()
    _fwd(**fields(x, rows, y, in_size, out_size), device=device, stream=_compiled.cuda_stream(device))
    return y


def backward(grad: Tensor, in_size: list[int], out_size: list[int]) -> Tensor:
    """The adjoint: (M, H*W, C) -> (M, h*w, C), contiguous."""
    grad, grad_x = backward_operands(grad, in_size)
    device = grad.get_device()
    _bwd(**fields(grad_x, None, grad, in_size, out_size), device=device, stream=_compiled.cuda_stream(device))
    return grad_x
