"""The definition of ragged_linear, in pure torch: LayerNorm and Linear layers, per expert on the rows of its pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def ragged_linear(
    x: Sequence[Tensor],
    index: Tensor | None,
    offsets: Sequence[int],
    num_pairs: int,
    norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor],
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> list[Tensor]:
    """One (P, L, O) per projection. ``weight`` and ``bias`` list the projections' experts one after the other."""
    num_experts = len(norm_weight)
    outputs: list[list[Tensor]] = [[] for _ in range(len(weight) // num_experts)]
    for e, source, rows in _experts(x, index, offsets):
        normed = _take(source, rows).to(norm_weight[e].dtype)
        normed = F.layer_norm(normed, normed.shape[-1:], norm_weight[e], norm_bias[e], eps).to(weight[e].dtype)
        for i, output in enumerate(outputs):
            j = i * num_experts + e
            output.append(F.linear(normed, weight[j], bias[j] if bias else None))
    padding = num_pairs - offsets[-1]
    for i, output in enumerate(outputs):
        w = weight[i * num_experts]
        if padding or not output:
            output.append(w.new_zeros((padding, x[0].shape[1], w.shape[0])))
    return [torch.cat(output) for output in outputs]


def ragged_linear_backward(
    grads: Sequence[Tensor],
    x: Sequence[Tensor],
    index: Tensor | None,
    offsets: Sequence[int],
    norm_weight: Sequence[Tensor],
    norm_bias: Sequence[Tensor],
    eps: float,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), norm_weight, norm_bias, weight and bias, in this order.

    With n = LN(x): dW = dy^T n, db = sum dy, dn = sum over the projections of dy W, and the rest is LayerNorm's.
    """
    num_experts = len(norm_weight)
    grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = (
        [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors]  # as the fake promises
        for tensors in (x if needs_x else (), norm_weight, norm_bias, weight, bias)
    )
    for e, source, rows in _experts(x, index, offsets):
        taken = _take(source, rows).to(norm_weight[e].dtype)
        width = taken.shape[-1:]
        normed, mean, rstd = torch.native_layer_norm(taken, width, norm_weight[e], norm_bias[e], eps)
        flat = normed.to(weight[e].dtype).flatten(0, 1)
        grad_normed = torch.zeros_like(flat)
        for i, grad in enumerate(grads):
            j = i * num_experts + e
            dy = grad[offsets[e] : offsets[e + 1]].flatten(0, 1)
            grad_weight[j] = dy.t() @ flat
            if bias:
                grad_bias[j] = dy.sum(0)
            grad_normed = torch.addmm(grad_normed, dy, weight[j])
        wanted = [needs_x, True, True]
        dx, dg, db = torch.ops.aten.native_layer_norm_backward(
            grad_normed.view_as(normed).to(normed.dtype),
            taken, width, mean, rstd, norm_weight[e], norm_bias[e], wanted,
        )  # fmt: skip
        grad_norm_weight[e], grad_norm_bias[e] = dg, db
        if needs_x:
            grad_x[e if len(x) > 1 else 0].index_add_(0, rows, dx.to(source.dtype))
    return [*grad_x, *grad_norm_weight, *grad_norm_bias, *grad_weight, *grad_bias]


def _experts(x: Sequence[Tensor], index: Tensor | None, offsets: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, the rows of its pairs) for every expert which has pairs."""
    for e, (start, stop) in enumerate(pairwise(offsets)):
        if stop > start:
            source = x[e] if len(x) > 1 else x[0]
            rows = torch.arange(start, stop, device=source.device) if index is None else index[start:stop]
            yield e, source, rows


def _take(source: Tensor, rows: Tensor) -> Tensor:
    # Within an expert rows ascend without repeats: as many rows as the source has are all of them, in order.
    return source if rows.shape[0] == source.shape[0] else source.index_select(0, rows)
