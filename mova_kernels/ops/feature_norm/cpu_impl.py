"""feature_norm in C++: packs the arguments for csrc/feature_norm/feature_norm.h, expert by expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _compiled
from ..feature_resample import cpu_impl as feature_resample

_NUMBERS = "M in_h in_w out_h out_w C x_stride_row x_stride_token eps:double dtype"
_fwd = _compiled.function("mk_feature_norm_fwd", "x rows y rstd", _NUMBERS)
_centre = _compiled.function("mk_feature_norm_centre", "x rows n rstd", _NUMBERS)
_bwd = _compiled.function(
    "mk_feature_norm_bwd", "grad rows y rstd grad_t", "M L C grad_stride_row grad_stride_token dtype"
)


def forward(
    features: Sequence[Tensor], rows: Sequence[Tensor | None], sizes: Sequence[int], eps: float
) -> tuple[list[Tensor], list[Tensor], None]:
    """(R_e, h_e*w_e, C_e) and (M_e,) int64 or None per expert; h_0, w_0, ..., H, W.

    Returns results (M_e, H*W, C_e) and their 1 / sqrt(var + eps) (M_e, H*W) fp32. Rows have been checked by then.
    """
    grids, out_size = _grids(sizes)
    pairs = [_forward(x, r, size, out_size, eps) for x, r, size in zip(features, rows, grids, strict=True)]
    return [y for y, _ in pairs], [rstd for _, rstd in pairs], None


def backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], rstds: Sequence[Tensor], rows: Sequence[Tensor | None],
    num_rows: Sequence[int], sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients of the features, (R_e, h_e*w_e, C_e), contiguous; bit for bit the same at every call."""
    grids, out_size = _grids(sizes)
    experts = zip(grads, results, rstds, rows, num_rows, grids, strict=True)
    return [_backward(g, y, rstd, r, n, size, out_size) for g, y, rstd, r, n, size in experts]


def centred(
    x: Tensor, rows: Tensor | None, in_size: Sequence[int], out_size: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    """(R, h*w, C), (M,) int64, none negative, or None -> x - mean(x), (M, h*w, C), and (M, H*W) fp32."""
    x = _compiled.adjacent_channels(x)
    rows = None if rows is None else rows.contiguous()
    m = x.shape[0] if rows is None else rows.shape[0]
    n = x.new_empty(m, *x.shape[1:])
    (in_h, in_w), (out_h, out_w) = in_size, out_size
    rstd = x.new_empty((m, out_h * out_w), dtype=torch.float32)
    _centre(
        x=x, rows=rows, n=n, rstd=rstd,
        M=m, in_h=in_h, in_w=in_w, out_h=out_h, out_w=out_w, C=x.shape[2], eps=eps, dtype=x.dtype,
    )  # fmt: skip
    return n, rstd


def _forward(
    x: Tensor, rows: Tensor | None, in_size: list[int], out_size: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    if rows is not None and rows.numel() > 0:
        torch._assert_async((rows < x.shape[0]).all(), f"rows must be below the features' {x.shape[0]} rows")
    x, rows, y = feature_resample.forward_operands(x, rows, out_size)
    m, tokens, channels = y.shape
    rstd = y.new_empty((m, tokens), dtype=torch.float32)
    (in_h, in_w), (out_h, out_w) = in_size, out_size
    _fwd(
        x=x, rows=rows, y=y, rstd=rstd,
        M=m, in_h=in_h, in_w=in_w, out_h=out_h, out_w=out_w, C=channels, eps=eps, dtype=x.dtype,
    )  # fmt: skip
    return y, rstd


def _backward(
    grad: Tensor, y: Tensor, rstd: Tensor, rows: Tensor | None, num_rows: int, in_size: list[int], out_size: list[int]
) -> Tensor:
    grad, rows = _compiled.adjacent_channels(grad), None if rows is None else rows.contiguous()
    y, rstd = y.contiguous(), rstd.contiguous()
    resampled = torch.empty_like(y)  # its gradient, rounded to the dtype as in torch
    M, L, C = y.shape
    _bwd(grad=grad, rows=rows, y=y, rstd=rstd, grad_t=resampled, M=M, L=L, C=C, dtype=y.dtype)
    grad_x = resampled if in_size == out_size else feature_resample.backward(resampled, in_size, out_size)
    if rows is None:
        return grad_x
    valid = rows >= 0
    return grad_x.new_zeros((num_rows, *grad_x.shape[1:])).index_add_(0, rows[valid], grad_x[valid])


def _grids(sizes: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """The experts' grids and the base grid."""
    *grids, out_size = ([h, w] for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    return grids, out_size
