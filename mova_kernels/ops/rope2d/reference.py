"""The definition of rope2d, in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rope2d_table(
    resolution: int, head_channels: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (R*R, D) in fp32 of a rotary embedding over an R x R grid.

    Channels 0 to D/2 - 1 turn with the token's grid row, the others with its column; in each half the pair (2k, 2k + 1)
    turns by position * 10000^(-2k / (D/2)).
    """
    # The official order of operations: t / R * R is not exactly t for every R (it is for 48).
    position = torch.arange(resolution, dtype=torch.float32, device=device) / resolution * resolution
    width = head_channels // 2
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    angle = (position[:, None] * (1.0 / 10000.0**exponent)).repeat_interleave(2, dim=1)  # (R, D/2)
    shape = (resolution, resolution, -1)
    angles = torch.cat([angle[:, None].expand(shape), angle[None].expand(shape)], -1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rope2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., L, H, D), tables (L, D): each adjacent pair (a, b) -> (a cos - b sin, b cos + a sin)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], -1).flatten(-2)
    return (wide * cos[:, None].to(wide.dtype) + turned * sin[:, None].to(wide.dtype)).to(x.dtype)
