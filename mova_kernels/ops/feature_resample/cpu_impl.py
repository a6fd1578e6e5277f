"""feature_resample in C++: packs the arguments for csrc/feature_resample/feature_resample.h."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import _compiled

TENSORS = "x rows y"
NUMBERS = "M in_h in_w out_h out_w C x_stride_row x_stride_token y_stride_row y_stride_token dtype"
_fwd = _compiled.function("mk_feature_resample_fwd", TENSORS, NUMBERS)
_bwd = _compiled.function("mk_feature_resample_bwd", TENSORS, NUMBERS)


def forward(x: Tensor, rows: Tensor | None, in_size: list[int], out_size: list[int]) -> Tensor:
    """(R, h*w, C), (M,) int64 or None -> (M, H*W, C), contiguous.

    Strides of rows and tokens are free; channels that are not adjacent are copied first. Rows are not range-checked.
    """
    x, rows, y = forward_operands(x, rows, out_size)
    _fwd(**fields(x, rows, y, in_size, out_size))
    return y


def backward(grad: Tensor, in_size: list[int], out_size: list[int]) -> Tensor:
    """The adjoint: (M, H*W, C), strides as above -> (M, h*w, C), contiguous."""
    grad, grad_x = backward_operands(grad, in_size)
    _bwd(**fields(grad_x, None, grad, in_size, out_size))
    return grad_x


def forward_operands(x: Tensor, rows: Tensor | None, out_size: list[int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """x and rows as C++ and CUDA take them, and the result (M, H*W, C), not yet written."""
    m = x.shape[0] if rows is None else rows.shape[0]
    y = x.new_empty((m, out_size[0] * out_size[1], x.shape[2]))
    return _compiled.adjacent_channels(x), None if rows is None else rows.contiguous(), y


def backward_operands(grad: Tensor, in_size: list[int]) -> tuple[Tensor, Tensor]:
    """grad as C++ and CUDA take it, and the result (M, h*w, C), not yet written."""
    grad_x = grad.new_empty((grad.shape[0], in_size[0] * in_size[1], grad.shape[2]))
    return _compiled.adjacent_channels(grad), grad_x


def fields(x: Tensor, rows: Tensor | None, y: Tensor, in_size: list[int], out_size: list[int]) -> dict[str, Any]:
    """The fields of mk_feature_resample_args."""
    (in_h, in_w), (out_h, out_w) = in_size, out_size
    return {
        "x": x, "rows": rows, "y": y,
        "M": y.shape[0], "in_h": in_h, "in_w": in_w, "out_h": out_h, "out_w": out_w, "C": y.shape[2], "dtype": x.dtype,
    }  # fmt: skip
