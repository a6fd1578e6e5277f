"""The definition of ragged_linear, in pure torch: per expert one linear layer on the rows of its pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ragged import PairTables


def ragged_linear(
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    offsets: Sequence[int],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """One (P, L, O) per projection.

    ``rows`` names the row of its source that a pair takes, see project() in op.py; ``offsets`` are expert_offsets on
    the host; ``weight`` and ``bias`` list the projections' experts one after the other.
    """
    num_experts = len(scale)
    outputs: list[list[Tensor]] = [[] for _ in range(len(weight) // num_experts)]
    for e, source, selected in _experts(x, rows, tables, offsets):
        taken = _take(source, selected).to(dtype)
        for i, output in enumerate(outputs):
            j = i * num_experts + e
            output.append(F.linear(taken, *folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)))
    padding = len(tables.sample) - offsets[-1]
    for i, output in enumerate(outputs):
        if padding or not output:
            output.append(x[0].new_zeros((padding, x[0].shape[1], weight[i * num_experts].shape[0]), dtype=dtype))
    return [torch.cat(output) for output in outputs]


def folded(
    scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one linear layer that is (x * scale + shift) W^T + b."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    constant = (weight.to(wide) * shift.to(wide)).sum(1)  # not a matrix product, which autocast would make narrow
    if bias is not None:
        constant = constant + bias.to(wide)
    return (weight * scale).to(dtype), constant.to(dtype)


def ragged_linear_backward(
    grads: Sequence[Tensor],
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    offsets: Sequence[int],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias, in this order.

    With V = W diag(scale), dV = dy^T x and s = sum dy: dx = dy V, dW = dV diag(scale) + s shift^T,
    dscale_c = sum_o dV_oc W_oc, dshift = W^T s and db = s.
    """
    num_experts = len(scale)
    grad_x, grad_scale, grad_shift, grad_weight, grad_bias = (
        [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors]  # as the fake promises
        for tensors in (x if needs_x else (), scale, shift, weight, bias)
    )
    for e, source, selected in _experts(x, rows, tables, offsets):
        taken = _take(source, selected).flatten(0, 1)
        for i, grad in enumerate(grads):
            j = i * num_experts + e
            w = weight[j]
            wide = torch.promote_types(w.dtype, torch.float32)
            dy = grad[offsets[e] : offsets[e + 1]].flatten(0, 1)
            grad_folded = (dy.t() @ taken.to(dy.dtype)).to(wide)
            total = dy.sum(0, dtype=wide)
            grad_weight[j].copy_(grad_folded * scale[e] + total[:, None] * shift[e])
            grad_scale[e] += (grad_folded * w).sum(0)
            grad_shift[e] += total @ w.to(wide)
            if bias:
                grad_bias[j].copy_(total)
            if needs_x:
                dx = dy @ (w * scale[e]).to(dy.dtype)
                dx = dx.to(source.dtype).unflatten(0, (len(selected), -1))
                grad_x[e if len(x) > 1 else 0].index_add_(0, selected, dx)
    return [*grad_x, *grad_scale, *grad_shift, *grad_weight, *grad_bias]


def _experts(
    x: Sequence[Tensor], rows: str, tables: PairTables, offsets: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, the rows of its pairs) for every expert which has pairs."""
    index = torch.arange(offsets[-1], device=x[0].device) if rows == "pair" else getattr(tables, rows)
    for e, (start, stop) in enumerate(pairwise(offsets)):
        if stop > start:
            yield e, x[e] if len(x) > 1 else x[0], index[start:stop]


def _take(source: Tensor, rows: Tensor) -> Tensor:
    # Within an expert rows ascend without repeats: as many rows as the source has are all of them, in order.
    return source if rows.shape[0] == source.shape[0] else source.index_select(0, rows)
