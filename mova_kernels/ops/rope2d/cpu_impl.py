"""rope2d in C++: packs the arguments for csrc/rope2d/rope2d.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled

_rotate = _compiled.function(
    "mk_rope2d", "x cos sin y", "B L H D x_stride_sample x_stride_token x_stride_head adjoint dtype"
)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    """(B, L, H, D), tables (L, D) -> the rotation, or the gradient of it; (B, L, H, D), contiguous."""
    x, cos, sin = _compiled.adjacent_channels(x), _table(cos), _table(sin)
    y = x.new_empty(x.shape)
    B, L, H, D = x.shape
    _rotate(x=x, cos=cos, sin=sin, y=y, B=B, L=L, H=H, D=D, adjoint=adjoint, dtype=x.dtype)
    return y


def _table(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
