"""swiglu_norm in Triton: a program holds a whole row of channels in its registers; fp32 inside, rounded once.

gate, up and the gradient are (B, L, WIDTH) with free strides of samples and tokens; the first F channels count. mean
and 1/deviation of each row are (B, L) fp32. The backward pass computes SiLU(gate) * up again. The gradients of weight
and bias are sums over rows: GROUPS programs each add up every GROUPS-th row, in order, and torch adds the results; the
grouping is the same on every device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import adjacent_channels, nan_if_infinite

# Not measured. With 16 channels per thread the backward kernel needs 128 registers at the official width, so that two
# programs fit on a multiprocessor; rows of 8192 channels, on 16 warps, would spill.
CHANNELS_PER_THREAD = 16
GROUPS = 256  # not measured; two programs for each multiprocessor of an H100, nine rows each of an official sample


@triton.jit
def _channels(WIDTH: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The channels, which of them exist, and which of them count; VECTOR of them are adjacent in every tensor.

    That hint gives all tensors the same layout. Without it weight and bias, aligned though the rows of 5460 bytes are
    not, drag the rows into theirs: loads that are not coalesced, and exchanges through shared memory.
    """
    channels = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    return channels, channels < WIDTH, channels < F


@triton.jit
def _row(x, row, stride_b, stride_l, L, VECTOR: tl.constexpr):
    """Pointer to row ``row`` of the B*L ones; VECTOR divides the strides."""
    start = (row // L).to(tl.int64) * stride_b + (row % L).to(tl.int64) * stride_l
    return x + tl.multiple_of(start, VECTOR)


@triton.jit
def _load(pointers, inside, counted):
    return tl.where(counted, tl.load(pointers, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _store(pointers, x, inside):
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    gate, up, weight, bias, out, mean, rstd, stride_gb, stride_gl, stride_ub, stride_ul, L, eps,
    WIDTH: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    channels, inside, counted = _channels(WIDTH, F, BLOCK, VECTOR)
    g = _load(_row(gate, row, stride_gb, stride_gl, L, VECTOR) + channels, inside, counted)
    u = _load(_row(up, row, stride_ub, stride_ul, L, VECTOR) + channels, inside, counted)
    product = g * tl.sigmoid(g) * u
    mu = tl.div_rn(tl.sum(product), F * 1.0)
    centred = tl.where(counted, product - mu, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred), F * 1.0)
    r = nan_if_infinite(tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), variance)
    y = tl.fma(centred * r, _load(weight + channels, inside, counted), _load(bias + channels, inside, counted))
    _store(out + row.to(tl.int64) * WIDTH + channels, y, inside)
    tl.store(mean + row, mu)
    tl.store(rstd + row, r)


@triton.jit
def _backward_kernel(
    grad, gate, up, weight, mean, rstd, grad_gate, grad_up, sum_weight, sum_bias,
    stride_db, stride_dl, stride_gb, stride_gl, stride_ub, stride_ul, L, num_rows,
    WIDTH: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    channels, inside, counted = _channels(WIDTH, F, BLOCK, VECTOR)
    w = _load(weight + channels, inside, counted)
    acc_weight = tl.zeros((BLOCK,), tl.float32)
    acc_bias = tl.zeros((BLOCK,), tl.float32)
    for row in range(group, num_rows, GROUPS):
        d = _load(_row(grad, row, stride_db, stride_dl, L, VECTOR) + channels, inside, counted)
        g = _load(_row(gate, row, stride_gb, stride_gl, L, VECTOR) + channels, inside, counted)
        u = _load(_row(up, row, stride_ub, stride_ul, L, VECTOR) + channels, inside, counted)
        r = tl.load(rstd + row)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        normed = (silu * u - tl.load(mean + row)) * r
        acc_weight = tl.fma(d, normed, acc_weight)
        acc_bias += d
        # d and w are zero where channels do not count, hence so are all summands.
        scaled = d * w
        mean_scaled = tl.div_rn(tl.sum(scaled), F * 1.0)
        mean_product = tl.div_rn(tl.sum(scaled * normed), F * 1.0)
        grad_product = r * tl.fma(normed, -mean_product, scaled - mean_scaled)
        start = tl.cast(row, tl.int64) * WIDTH
        _store(grad_up + start + channels, grad_product * silu, inside)
        _store(grad_gate + start + channels, grad_product * u * tl.fma(silu, 1.0 - sigmoid, sigmoid), inside)
    start = group.to(tl.int64) * WIDTH
    tl.store(sum_weight + start + channels, acc_weight, mask=inside)
    tl.store(sum_bias + start + channels, acc_bias, mask=inside)


def forward(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, WIDTH) x 2, (WIDTH,) x 2 -> out (B, L, WIDTH), contiguous; mean and 1/deviation (B, L) fp32."""
    gate, up = adjacent_channels(gate), adjacent_channels(up)
    out = gate.new_empty(gate.shape)
    mean, rstd = (gate.new_empty(gate.shape[:2], dtype=torch.float32) for _ in range(2))
    if out.numel():
        with torch.cuda.device_of(gate):
            _forward_kernel[(mean.numel(),)](
                gate, up, weight.contiguous(), bias.contiguous(), out, mean, rstd, *_strides(gate, up), gate.shape[1],
                eps, **_options(channels, gate, up),
            )  # fmt: skip
    return out, mean, rstd


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up, (B, L, WIDTH), contiguous, and of weight and bias, fp32; always the same bits."""
    grad, gate, up = (adjacent_channels(t) for t in (grad, gate, up))
    num_rows, width = mean.numel(), gate.shape[2]
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    sums = [gate.new_empty((min(GROUPS, num_rows), width), dtype=torch.float32) for _ in range(2)]
    if gate.numel():
        with torch.cuda.device_of(gate):
            _backward_kernel[(len(sums[0]),)](
                grad, gate, up, weight.contiguous(), mean.contiguous(), rstd.contiguous(), grad_gate, grad_up, *sums,
                *_strides(grad, gate, up), gate.shape[1], num_rows, GROUPS=GROUPS, **_options(channels, grad, gate, up),
            )  # fmt: skip
    return grad_gate, grad_up, sums[0].sum(0), sums[1].sum(0)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: the official width, and padded as halves of one projection; the widest."""
    for dtype, channels, width, stride, affine in (
        (torch.bfloat16, 2730, 2730, 2730, torch.bfloat16),
        (torch.bfloat16, 2730, 2752, 5504, torch.bfloat16),
        (torch.float32, 2730, 2752, 5504, torch.float32),
        (torch.float32, 4096, 4096, 4096, torch.float32),
    ):
        name = f"{str(dtype).removeprefix('torch.')} F={channels} width={width}"
        yield name, functools.partial(_compile_case, dtype, channels, width, stride, affine)


def _compile_case(dtype: torch.dtype, channels: int, width: int, stride: int, affine_dtype: torch.dtype) -> None:
    x = torch.empty(2, 2304, stride, dtype=dtype, device="meta")[..., :width]
    affine = torch.empty(width, dtype=affine_dtype, device="meta")
    _, mean, rstd = forward(x, x, affine, affine, 1e-5, channels)
    backward(torch.empty(2, 2304, width, dtype=dtype, device="meta"), x, x, affine, mean, rstd, channels)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()[:2]]


def _options(channels: int, *tensors: Tensor) -> dict[str, Any]:
    width = tensors[0].shape[2]
    block = triton.next_power_of_2(width)
    return {
        "WIDTH": width,
        "F": channels,
        "BLOCK": block,
        "VECTOR": math.gcd(16, width, *_strides(*tensors)),
        "num_warps": max(1, block // (32 * CHANNELS_PER_THREAD)),
        # The compiler would subtract the mean of rounded products from unrounded ones, so that a single channel would
        # not be all mean. Where a fused multiply-add does no harm, the kernels ask for it.
        "enable_fp_fusion": False,
    }
