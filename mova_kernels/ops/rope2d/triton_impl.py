"""rope2d in Triton: a program rotates a tile of tokens for a few heads, which share the tables that it has read.

Tensors are (B, L, H, D) with free strides of samples, tokens and heads. Neighbouring programs have the same tokens, so
that their tables are in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import adjacent_channels, rotate_pairs

# Not measured. Eight channels per thread are one 16-byte load in bf16; with four heads per program the tables cost as
# many bytes as tokens and result, and one official sample gives 576 programs.
ELEMENTS = 1024  # of a tile; four warps
HEADS = 4  # per program


@triton.jit
def _rotate_kernel(
    x, cos, sin, y, stride_xb, stride_xl, stride_xh, stride_yb, stride_yl, stride_yh, L, H, num_tiles,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    num_groups = tl.cdiv(H, GROUP)
    first = (program % num_groups) * GROUP
    tokens = ((program // num_groups) % num_tiles) * TILE + tl.arange(0, TILE)[:, None]
    sample = (program // num_groups // num_tiles).to(tl.int64)
    channels = tl.arange(0, BLOCK)[None, :]
    inside = tokens < L
    if D != BLOCK:
        inside = inside & (channels < D)
    rows = tokens.to(tl.int64)
    cos_tile = tl.load(cos + rows * D + channels, mask=inside, other=0.0)
    sin_tile = tl.load(sin + rows * D + channels, mask=inside, other=0.0)
    x_tile = x + sample * stride_xb + rows * stride_xl + channels
    y_tile = y + sample * stride_yb + rows * stride_yl + channels
    for head in range(first, tl.minimum(first + GROUP, H)):
        turned = tl.load(x_tile + tl.cast(head, tl.int64) * stride_xh, mask=inside, other=0.0)
        turned = rotate_pairs(turned, cos_tile, sin_tile, ADJOINT).to(y.dtype.element_ty)
        tl.store(y_tile + tl.cast(head, tl.int64) * stride_yh, turned, mask=inside)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool) -> Tensor:
    """(B, L, H, D), fp32 tables (L, D) -> the rotation, or the gradient of it; (B, L, H, D), contiguous."""
    x = adjacent_channels(x)
    y = x.new_empty(x.shape)
    num_samples, length, heads, width = x.shape
    if y.numel():
        block = triton.next_power_of_2(width)
        tile = max(1, ELEMENTS // block)
        num_tiles = triton.cdiv(length, tile)
        with torch.cuda.device_of(x):
            _rotate_kernel[(num_samples * num_tiles * triton.cdiv(heads, HEADS),)](
                x, cos.contiguous(), sin.contiguous(), y, *x.stride()[:3], *y.stride()[:3], length, heads, num_tiles,
                D=width, BLOCK=block, TILE=tile, GROUP=HEADS, ADJOINT=adjoint,
            )  # fmt: skip
    return y


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: the official sizes, and a width that fills no block."""
    for dtype, width in ((torch.bfloat16, 64), (torch.float32, 64), (torch.float16, 12)):
        name = f"{str(dtype).removeprefix('torch.')} rope D={width}"
        yield name, functools.partial(_compile_case, dtype, width)


def _compile_case(dtype: torch.dtype, width: int) -> None:
    x = torch.empty(2, 2304, 16, width, dtype=dtype, device="meta")
    table = torch.empty(2304, width, device="meta")
    for adjoint in (False, True):
        rotated(x, table, table, adjoint)
