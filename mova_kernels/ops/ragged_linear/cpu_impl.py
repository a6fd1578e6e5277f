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
from ..feature_resample import cpu_impl as feature_resample
from . import reference
from .reference import PairInputs

_sum = _compiled.function("mk_ragged_linear_sum", "x sum", "R C x_stride_row dtype")
_unfold = _compiled.function(
    "mk_ragged_linear_unfold",
    "grad_folded weight total scale shift grad_weight grad_scale grad_shift",
    "O C grad_folded_stride_row weight_stride_row dtype",
)
_resample = _compiled.function("mk_ragged_linear_resample", "x scale shift y", "M in_h in_w out_h out_w C dtype")


class _Resampling(NamedTuple):
    """How the projected tokens of an expert are resampled and scaled (feature_norm's CentredFeatures)."""

    rstd: Tensor  # (R, H*W) fp32
    in_size: list[int]
    out_size: list[int]

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
        return feature_resample.backward(scaled, self.in_size, self.out_size)


def _resamplings(inputs: PairInputs) -> list[_Resampling | None]:
    rstds, sizes = inputs.rstds, inputs.sizes
    if not rstds:
        return [None] * len(inputs.parameters.scale)
    grids = [list(sizes[i : i + 4]) for i in range(0, len(sizes), 4)]
    return [r if r is None else _Resampling(r, g[:2], g[2:]) for r, g in zip(rstds, grids, strict=True)]


def forward(inputs: PairInputs, dtype: torch.dtype) -> list[Tensor]:
    """One (P, L, O) per projection."""
    x, parameters, offsets = inputs.x, inputs.parameters, inputs.tables.expert_offsets.tolist()
    scale, shift, weight, bias = parameters
    num_experts, resamplings = len(scale), _resamplings(inputs)
    like, num_pairs = x[0].new_empty(0, dtype=dtype), len(inputs.rows)
    outputs = [_compiled.empty(like, num_pairs, inputs.length, width) for width in parameters.outputs]
    with torch.autocast("cpu", enabled=False):
        for e, source, rows in reference.experts(x, inputs.rows, offsets):
            taken, resampling = reference.take(source, rows).to(dtype), resamplings[e]
            for i, output in enumerate(outputs):
                j, out = i * num_experts + e, output[offsets[e] : offsets[e + 1]]
                narrow, constant = reference.folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)
                if resampling is None:
                    product(taken, narrow, constant, out=out)
                else:
                    resampling.forward(product(taken, narrow), rows, constant, out)
    if offsets[-1] < num_pairs:
        for output in outputs:
            output[offsets[-1] :] = 0
    return outputs


def backward(grads: Sequence[Tensor], inputs: PairInputs, needs_x: bool) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias; always the same bits."""
    offsets, resamplings = inputs.tables.expert_offsets.tolist(), _resamplings(inputs)

    def gradients(e: int, dy: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        total, resampling = column_sums(dy), resamplings[e]
        if resampling is not None:
            rows = inputs.rows[offsets[e] : offsets[e + 1]]
            dy = resampling.adjoint(dy.unflatten(0, (len(rows), -1)), rows).flatten(0, 1)
        return weight_gradients(dy, total, *others)

    with torch.autocast("cpu", enabled=False):
        return reference.backward(grads, inputs, needs_x, product, gradients)


def weight_gradients(
    dy: Tensor, total: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients that reference.layer_gradients computes; the one of the weight in its dtype, the others in fp32."""
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
