"""gated_combine in Triton: normalise and weight the pairs' tokens, then sum a sample's products into its tokens.

With z_p = gate_p * normalised(attended_p), y_b = x_b + sum over the pairs p of b of z_p V_e^T + gate_p constant_e is
one matrix product, as deep as the widths of the sample's experts together. V and the products are ragged_linear's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import adjacent_channels, nan_if_infinite
from ...routing import ExpertParameters, PairTables
from ..ragged_linear.triton_impl import collect, fold, grad_weights

ELEMENTS = 4096  # of the tile which a program normalises: 32 in each thread of its 4 warps


@triton.jit
def _normalised(x, width, eps, ok):
    """(rows, channels) in fp32 -> (x - mean) / sqrt(var + eps), and 1 / sqrt(var + eps), per row."""
    centred = tl.where(ok, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    rstd = nan_if_infinite(tl.rsqrt(variance + eps), variance)
    return centred * rstd[:, None], rstd


@triton.jit
def _weigh_kernel(
    x, gate, num_valid, z, stride_p, stride_l, eps,
    L: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = gate * normalised(x); nothing is written for padding."""
    p = tl.program_id(0).to(tl.int64)
    if p >= tl.load(num_valid):
        return
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    ok = (rows < L)[:, None] & (columns < WIDTH)[None, :]
    place = x + p * stride_p + rows[:, None].to(tl.int64) * stride_l + columns[None, :]
    normed, _ = _normalised(tl.load(place, mask=ok, other=0.0).to(tl.float32), WIDTH, eps, ok)
    out = z + (p * L + rows[:, None]) * WIDTH + columns[None, :]
    tl.store(out, (normed * tl.load(gate + p)).to(z.dtype.element_ty), mask=ok)


@triton.jit
def _weigh_backward_kernel(
    x, grad, gate, num_valid, grad_x, z, grad_gate, stride_p, stride_l, eps,
    L: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With grad = dz / gate: the gradient of x, what each token adds to that of the gate, and z once more.

    Padding gets gradients of zero.
    """
    p = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    ok = (rows < L)[:, None] & (columns < WIDTH)[None, :]
    packed = (p * L + rows[:, None]) * WIDTH + columns[None, :]
    if p >= tl.load(num_valid):
        tl.store(grad_x + packed, tl.zeros((ROWS, BLOCK), grad_x.dtype.element_ty), mask=ok)
        tl.store(grad_gate + p * L + rows, tl.zeros((ROWS,), tl.float32), mask=rows < L)
        return
    place = x + p * stride_p + rows[:, None].to(tl.int64) * stride_l + columns[None, :]
    normed, rstd = _normalised(tl.load(place, mask=ok, other=0.0).to(tl.float32), WIDTH, eps, ok)
    dz = tl.load(grad + packed, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(gate + p)
    along = tl.sum(dz * normed, 1)
    dx = (dz - (tl.sum(dz, 1) / WIDTH)[:, None] - normed * (along / WIDTH)[:, None]) * (rstd * weight)[:, None]
    tl.store(grad_x + packed, dx.to(grad_x.dtype.element_ty), mask=ok)
    tl.store(z + packed, (normed * weight).to(z.dtype.element_ty), mask=ok)
    tl.store(grad_gate + p * L + rows, along, mask=rows < L)


def forward(
    x: Tensor, attended: Tensor, gate: Tensor, tables: PairTables, parameters: ExpertParameters, eps: float
) -> Tensor:
    """(B, L, C), (P, L, I), fp32 (P,) -> (B, L, C) in the dtype of x; arguments as in op.py."""
    y = x.new_empty(x.shape)
    with torch.cuda.device_of(x):
        folded = fold(tables, parameters, attended.dtype)
        z = attended.new_empty(attended.shape)
        _launch(_weigh_kernel, attended, (gate, tables.num_valid, z), eps)
        collect([z], None, folded, tables, [y], by_sample=True, transposed=True, residual=x, gate=gate)
    return y


def backward(
    grad: Tensor, attended: Tensor, gate: Tensor, tables: PairTables, parameters: ExpertParameters, eps: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of attended, gate, and (scale, shift, weight and bias); that of x is ``grad`` itself.

    Zeros for padding and for experts without pairs.
    """
    dy = grad.to(attended.dtype)
    with torch.cuda.device_of(grad):
        folded = fold(tables, parameters, attended.dtype)
        dz, grad_attended, z = (attended.new_empty(attended.shape) for _ in range(3))
        along = gate.new_empty(attended.shape[:2])
        collect([dy], tables.sample, folded, tables, [dz])
        _launch(_weigh_backward_kernel, attended, (dz, gate, tables.num_valid, grad_attended, z, along), eps)
        of_parameters = grad_weights([dy], tables.sample, [z], None, gate, tables, parameters)
        of_constant = (grad.sum(1, dtype=torch.float32)[tables.sample] * folded.constant[tables.expert]).sum(1)
        in_use = torch.arange(len(gate), device=gate.device) < tables.num_valid
        grad_gate = along.sum(1) + torch.where(in_use, of_constant, 0)
    return grad_attended, grad_gate, of_parameters


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: the official model, and odd sizes."""
    yield "bfloat16", functools.partial(_compile_case, torch.bfloat16, 1024, 2304)
    yield "float32", functools.partial(_compile_case, torch.float32, 1024, 2304)
    yield "odd sizes bfloat16", functools.partial(_compile_case, torch.bfloat16, 1000, 2300)


def _compile_case(dtype: torch.dtype, width: int, length: int) -> None:
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    tables = PairTables(*[torch.empty(24, dtype=torch.int64, device="meta")] * 6)
    x, attended, gate = empty(8, length, width), empty(24, length, width), torch.empty(24, device="meta")
    parameters = ExpertParameters([empty(width)] * 7, [empty(width)] * 7, [empty(width, width)] * 7, [empty(width)] * 7)
    forward(x, attended, gate, tables, parameters, 1e-5)
    backward(x, attended, gate, tables, parameters, 1e-5)


def _launch(kernel, x: Tensor, tensors: tuple[Tensor, ...], eps: float) -> None:
    """``tensors`` are contiguous; the strides of x are free."""
    x = adjacent_channels(x)
    num_pairs, length, width = x.shape
    block = triton.next_power_of_2(width)
    rows = max(ELEMENTS // block, 1)
    if x.numel():
        kernel[(num_pairs, triton.cdiv(length, rows))](
            x, *tensors, x.stride(0), x.stride(1), eps, L=length, WIDTH=width, ROWS=rows, BLOCK=block
        )
