"""What the Triton kernels of expert_attention share: tiles of the tokens of one (pair, head)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.device import rotate_pairs

LONGEST = tl.constexpr(2.0**63)  # the product of two shorter ones has room in fp32


@triton.jit
def tile_of(x, pair, head, rows, stride_p, stride_l, D: tl.constexpr):
    """Pointers to the (rows, D) part of head ``head`` of (P, L, H*D)."""
    base = x + pair * stride_p + head * D
    return base + rows.to(tl.int64)[:, None] * stride_l + tl.arange(0, D)[None, :]


@triton.jit
def load_tile(pointers, rows, L: tl.constexpr, CUT: tl.constexpr):
    if CUT:
        return tl.load(pointers, mask=rows[:, None] < L, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_rows(pointers, rows, L: tl.constexpr, CUT: tl.constexpr):
    if CUT:
        return tl.load(pointers, mask=rows < L, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(pointers, x, rows, L: tl.constexpr, CUT: tl.constexpr):
    x = x.to(pointers.dtype.element_ty)
    if CUT:
        tl.store(pointers, x, mask=rows[:, None] < L)
    else:
        tl.store(pointers, x)


@triton.jit
def rotated(x, cos, sin, rows, L: tl.constexpr, D: tl.constexpr, ADJOINT: tl.constexpr, CUT: tl.constexpr):
    """(rows, D), each pair of adjacent channels turned by its token's angles; ADJOINT: the gradient of that.

    In fp32, or in fp64 for an ``x`` of fp64.
    """
    table = rows[:, None] * D + tl.arange(0, D)[None, :]
    cos_tile = load_tile(cos + table, rows, L, CUT)
    sin_tile = load_tile(sin + table, rows, L, CUT)
    return rotate_pairs(x, cos_tile, sin_tile, ADJOINT)


@triton.jit
def scorable(x, DTYPE: tl.constexpr):
    """(rows, D) in fp32, with NaN for tokens so long that a sum in their scores might overflow; fp16 has none."""
    if DTYPE == tl.float16:
        return x
    return tl.where((tl.sum(x * x, 1) < LONGEST * LONGEST)[:, None], x, float("nan"))


@triton.jit
def place(num_valid, H, num_tiles, TILE: tl.constexpr):
    """pair, head and tokens of this program; whether the pair is padding."""
    program = tl.program_id(0)
    head = (program // num_tiles) % H
    pair = (program // num_tiles // H).to(tl.int64)
    rows = (program % num_tiles) * TILE + tl.arange(0, TILE)
    padding = False
    if num_valid is not None:
        padding = pair >= tl.load(num_valid)
    return pair, head, rows, padding
