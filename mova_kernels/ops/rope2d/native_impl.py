"""rope2d in C++: packs the arguments for csrc/rope2d/rope2d.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native

# x, cos, sin, y; B, L, H, D, three strides, adjoint, dtype
_rotate = _native.function("mk_rope2d", "4Q9q")


def rotated(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    """(B, L, H, D), tables (L, D) -> the rotation, or the gradient of it; (B, L, H, D), contiguous."""
    x, cos, sin = _native.adjacent_channels(x), _table(cos), _table(sin)
    y = x.new_empty(x.shape)
    _rotate(
        x, cos, sin, y, *x.shape, *x.stride()[:3], adjoint,
        _native.DTYPES[x.dtype],
    )  # fmt: skip
    return y


def _table(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
