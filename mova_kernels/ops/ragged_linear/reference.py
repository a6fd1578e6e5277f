"""The definition of ragged_linear, in pure torch: per expert one linear layer on the rows of its pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ragged import PairTables

Product = Callable[..., Tensor]


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
    for e, source, selected in experts(x, rows, tables, offsets):
        taken = take(source, selected).to(dtype)
        for i, output in enumerate(outputs):
            j = i * num_experts + e
            output.append(F.linear(taken, *folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)))
    padding = len(tables.sample) - offsets[-1]
    for i, output in enumerate(outputs):
        if padding or not output:
            output.append(x[0].new_zeros((padding, x[0].shape[1], weight[i * num_experts].shape[0]), dtype=dtype))
    return [torch.cat(output) if len(output) > 1 else output[0] for output in outputs]


def ragged_linear_on_device(
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The same in operators alone, none of which needs the offsets on the host: what is traced serves every routing."""
    num_experts, num_pairs, first = len(scale), tables.sample.shape[0], x[0]  # len() would keep the number as it is now
    pairs = torch.arange(num_pairs, device=first.device)
    outputs = [first.new_zeros(num_pairs, first.shape[1], w.shape[0], dtype=dtype) for w in weight[::num_experts]]
    for e in range(num_experts):
        own = (pairs >= tables.expert_offsets[e]) & (pairs < tables.expert_offsets[e + 1])
        own = own.nonzero().squeeze(1)
        index = own if rows == "pair" else getattr(tables, rows)[own]
        taken = (x[e] if len(x) > 1 else first).index_select(0, index).to(dtype)
        for i, output in enumerate(outputs):
            j = i * num_experts + e
            parameters = folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)
            outputs[i] = output.index_put((own,), F.linear(taken, *parameters))
    return outputs


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
    product: Product = F.linear,
    gradients: Callable[..., tuple[Tensor, ...]] | None = None,
) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias, in this order.

    With V = W diag(scale) and s = sum dy: dx = dy V and db = s. The others are those of :func:`weight_gradients` or of
    ``gradients``, which is something better.
    """
    gradients = gradients or weight_gradients
    num_experts = len(scale)
    grad_x, grad_scale, grad_shift, grad_weight, grad_bias = (
        [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors]  # as the fake promises
        for tensors in (x if needs_x else (), scale, shift, weight, bias)
    )
    for e, source, selected in experts(x, rows, tables, offsets):
        taken = take(source, selected).flatten(0, 1)
        for i, grad in enumerate(grads):
            j = i * num_experts + e
            dy = grad[offsets[e] : offsets[e + 1]].flatten(0, 1)
            found = gradients(e, dy, taken.to(dy.dtype), scale[e], shift[e], weight[j])
            grad_weight[j].copy_(found[0])
            grad_scale[e] += found[1]
            grad_shift[e] += found[2]
            if bias:
                grad_bias[j].copy_(found[3])
            if needs_x:
                dx = product(dy, (weight[j] * scale[e]).to(dy.dtype).t())
                dx = dx.to(source.dtype).unflatten(0, (len(selected), -1))
                grad_x[e if len(x) > 1 else 0].index_add_(0, selected, dx)
    return [*grad_x, *grad_scale, *grad_shift, *grad_weight, *grad_bias]


def weight_gradients(
    _: int, dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An expert, (R, O), (R, C), (C,), (C,), (O, C) -> gradients of weight, scale, shift and bias, fp32 or wider."""
    total = dy.sum(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    return unfolded(dy.t() @ x, total, scale, shift, weight)


def unfolded(
    grad_folded: Tensor, total: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From dV = dy^T x and s = sum dy: dW = dV diag(scale) + s shift^T, dscale_c = sum_o dV_oc W_oc, dshift = W^T s."""
    grad_folded, wide = grad_folded.to(total.dtype), weight.to(total.dtype)
    grad_weight = grad_folded * scale + total[:, None] * shift
    return grad_weight, (grad_folded * wide).sum(0), total @ wide, total


def experts(
    x: Sequence[Tensor], rows: str, tables: PairTables, offsets: Sequence[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, the rows of its pairs) for every expert which has pairs."""
    index = torch.arange(offsets[-1], device=x[0].device) if rows == "pair" else getattr(tables, rows)
    for e, (start, stop) in enumerate(pairwise(offsets)):
        if stop > start:
            yield e, x[e] if len(x) > 1 else x[0], index[start:stop]


def take(source: Tensor, rows: Tensor) -> Tensor:
    # Within an expert rows ascend without repeats: as many rows as the source has are all of them, in order.
    return source if rows.shape[0] == source.shape[0] else source.index_select(0, rows)
