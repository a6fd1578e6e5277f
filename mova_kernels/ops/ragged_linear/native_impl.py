"""ragged_linear on a CPU: the reference's steps, with products of _linear.py and what is between them in C++.

The C side is csrc/ragged_linear/ragged_linear.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _native
from ..._linear import product
from ...ragged import PairTables
from . import reference

# x, sum; R, C, stride, dtype
_sum = _native.function("mk_ragged_linear_sum", "2Q4q")
# dV, W, total, scale, shift, dW, dscale, dshift; O, C, two strides, dtype
_unfold = _native.function("mk_ragged_linear_unfold", "8Q5q")


def forward(
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """One (P, L, O) per projection; arguments as in op.py."""
    offsets, num_experts = tables.expert_offsets.tolist(), len(scale)
    shapes = [(len(tables.sample), x[0].shape[1], w.shape[0]) for w in weight[::num_experts]]
    outputs = [x[0].new_empty(shape, dtype=dtype) for shape in shapes]
    with torch.autocast("cpu", enabled=False):
        for e, source, selected in reference.experts(x, rows, tables, offsets):
            taken = reference.take(source, selected).to(dtype)
            for i, output in enumerate(outputs):
                j = i * num_experts + e
                folded = reference.folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)
                product(taken, *folded, out=output[offsets[e] : offsets[e + 1]])
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
) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias; always the same bits."""
    offsets = tables.expert_offsets.tolist()
    with torch.autocast("cpu", enabled=False):
        return reference.ragged_linear_backward(
            grads, x, rows, tables, offsets, scale, shift, weight, bias, needs_x, product, weight_gradients
        )


def weight_gradients(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What reference.weight_gradients computes; the gradient of the weight in its dtype, the others in fp32."""
    total = column_sums(dy)
    grad_folded = product(dy.t(), x.t())
    if {t.dtype for t in (grad_folded, scale, shift)} != {weight.dtype}:  # autocast
        return reference.unfolded(grad_folded, total, scale, shift, weight)
    weight = _native.adjacent_channels(weight)
    scale, shift = scale.contiguous(), shift.contiguous()
    grad_weight = torch.empty_like(grad_folded, memory_format=torch.contiguous_format)
    grad_scale, grad_shift = (grad_folded.new_empty(len(scale), dtype=torch.float32) for _ in range(2))
    tensors = (grad_folded, weight, total, scale, shift, grad_weight, grad_scale, grad_shift)
    _unfold(
        *(t.data_ptr() for t in tensors), *weight.shape, grad_folded.stride(0), weight.stride(0),
        _native.DTYPES[weight.dtype],
    )  # fmt: skip
    return grad_weight, grad_scale, grad_shift, total


def column_sums(x: Tensor) -> Tensor:
    """(R, C) -> (C,) fp32."""
    x = _native.adjacent_channels(x)
    total = x.new_empty(x.shape[1], dtype=torch.float32)
    _sum(x.data_ptr(), total.data_ptr(), *x.shape, x.stride(0), _native.DTYPES[x.dtype])
    return total
