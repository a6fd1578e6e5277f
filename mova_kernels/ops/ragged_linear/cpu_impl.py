"""ragged_linear on a CPU: the reference's steps, with products of _linear.py and what is between them in C++.

The C side is csrc/ragged_linear/ragged_linear.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _compiled
from ..._linear import product
from ...ragged import PairTables
from ..feature_resample import cpu_impl as feature_resample
from . import reference

_sum = _compiled.function("mk_ragged_linear_sum", "x sum", "R C x_stride_row dtype")
_unfold = _compiled.function(
    "mk_ragged_linear_unfold",
    "grad_folded weight total scale shift grad_weight grad_scale grad_shift",
    "O C grad_folded_stride_row weight_stride_row dtype",
)
_resample = _compiled.function("mk_ragged_linear_resample", "x scale shift y", "M in_h in_w out_h out_w C dtype")


class Resampling(NamedTuple):
    """What is still to be done with the projected tokens of an expert (feature_norm's CentredFeatures)."""

    rstd: Tensor  # (R, H*W) fp32
    in_size: Sequence[int]
    out_size: Sequence[int]

    def forward(self, x: Tensor, rows: Tensor, constant: Tensor, out: Tensor) -> None:
        """(n, h*w, O), (n,), (O,) -> (n, H*W, O)."""
        (in_h, in_w), (out_h, out_w) = self.in_size, self.out_size
        _resample(
            x=x, scale=self.rstd[rows], shift=constant.float(), y=out,
            M=len(x), in_h=in_h, in_w=in_w, out_h=out_h, out_w=out_w, C=x.shape[2], dtype=x.dtype,
        )  # fmt: skip

    def adjoint(self, dy: Tensor, rows: Tensor) -> Tensor:
        """(n, H*W, O), (n,) -> (n, h*w, O)."""
        scaled = dy * self.rstd[rows, :, None].to(dy.dtype)
        return feature_resample.backward(scaled, list(self.in_size), list(self.out_size))


def forward(
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dtype: torch.dtype,
    resamplings: Sequence[Resampling | None] | None = None,
) -> list[Tensor]:
    """One (P, L, O) per projection; arguments as in op.py."""
    offsets, num_experts = tables.expert_offsets.tolist(), len(scale)
    resamplings = resamplings or [None] * num_experts
    length = next((r.rstd.shape[1] for r in resamplings if r), x[0].shape[1])
    shapes = [(len(tables.sample), length, w.shape[0]) for w in weight[::num_experts]]
    outputs = [_compiled.empty(x[0].new_empty(0, dtype=dtype), *shape) for shape in shapes]
    with torch.autocast("cpu", enabled=False):
        for e, source, selected in reference.experts(x, rows, tables, offsets):
            taken, resampling = reference.take(source, selected).to(dtype), resamplings[e]
            for i, output in enumerate(outputs):
                j, out = i * num_experts + e, output[offsets[e] : offsets[e + 1]]
                narrow, constant = reference.folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)
                if resampling is None:
                    product(taken, narrow, constant, out=out)
                else:
                    resampling.forward(product(taken, narrow), selected, constant, out)
    if offsets[-1] < len(tables.sample):
        for output in outputs:
            output[offsets[-1] :] = 0
    return outputs


def backward(
    grads: Sequence[Tensor],
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    needs_x: bool,
    resamplings: Sequence[Resampling | None] | None = None,
) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias; always the same bits."""
    offsets = tables.expert_offsets.tolist()
    resamplings = resamplings or [None] * len(scale)

    def gradients(e: int, dy: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        total, resampling = column_sums(dy), resamplings[e]
        if resampling is not None:
            selected = tables.row[offsets[e] : offsets[e + 1]]
            dy = resampling.adjoint(dy.unflatten(0, (len(selected), -1)), selected).flatten(0, 1)
        return weight_gradients(dy, total, *others)

    with torch.autocast("cpu", enabled=False):
        return reference.ragged_linear_backward(
            grads, x, rows, tables, offsets, scale, shift, weight, bias, needs_x, product, gradients
        )


def weight_gradients(
    dy: Tensor, total: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What reference.weight_gradients computes; the gradient of the weight in its dtype, the others in fp32."""
    grad_folded = product(dy.t(), x.t())
    if {t.dtype for t in (grad_folded, scale, shift)} != {weight.dtype}:  # autocast
        return reference.unfolded(grad_folded, total, scale, shift, weight)
    weight = _compiled.adjacent_channels(weight)
    scale, shift = scale.contiguous(), shift.contiguous()
    grad_weight = torch.empty_like(grad_folded, memory_format=torch.contiguous_format)
    grad_scale, grad_shift = (grad_folded.new_empty(len(scale), dtype=torch.float32) for _ in range(2))
    _unfold(
        grad_folded=grad_folded, weight=weight, total=total, scale=scale, shift=shift,
        grad_weight=grad_weight, grad_scale=grad_scale, grad_shift=grad_shift,
        O=weight.shape[0], C=weight.shape[1], dtype=weight.dtype,
    )  # fmt: skip
    return grad_weight, grad_scale, grad_shift, total


def column_sums(x: Tensor) -> Tensor:
    """(R, C) -> (C,) fp32."""
    x = _compiled.adjacent_channels(x)
    total = x.new_empty(x.shape[1], dtype=torch.float32)
    _sum(x=x, sum=total, R=x.shape[0], C=x.shape[1], dtype=x.dtype)
    return total
