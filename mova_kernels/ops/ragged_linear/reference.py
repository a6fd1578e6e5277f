"""The definition of ragged_linear, in pure torch: per expert one linear layer on the rows of its pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...routing import ExpertParameters, PairTables


class PairInputs(NamedTuple):
    """What ragged_linear's implementations take.

    Attributes:
        x: the sources: one for all experts, or one per expert.
        shared: whether a pair takes the row ``tables.sample`` of its source; otherwise ``tables.row``.
        tables: the pairs.
        parameters: the linear layers.
        rstds: empty; or per expert None, or (R_e, H*W) fp32 where the source is CentredFeatures.tokens.
        sizes: per entry of ``rstds`` h, w, H, W; zeros for None.
    """

    x: Sequence[Tensor]
    shared: bool
    tables: PairTables
    parameters: ExpertParameters
    rstds: Sequence[Tensor | None] = ()
    sizes: Sequence[int] = ()

    @classmethod
    def of_raw(cls, x, shared, tables, scale, shift, weight, bias, rstds, sizes):
        """From the arguments of a raw op."""
        return cls(x, shared, PairTables(*tables), ExpertParameters(scale, shift, weight, bias), rstds, sizes)

    @property
    def rows(self) -> Tensor:
        """(P,) the row of its source that each pair takes."""
        return self.tables.sample if self.shared else self.tables.row

    @property
    def length(self) -> int:
        """L, the tokens of a pair."""
        return next((rstd.shape[1] for rstd in self.rstds if rstd is not None), self.x[0].shape[1])


def ragged_linear(
    x: Sequence[Tensor], index: Tensor, offsets: Sequence[int], parameters: ExpertParameters, dtype: torch.dtype
) -> list[Tensor]:
    """One (P, L, O) per projection.

    ``x`` is one source for all experts, or one per expert, and ``index``, (P,), the row of it that a pair takes.
    ``offsets`` are expert_offsets on the host; behind the last one the results are zeros.
    """
    scale, shift, weight, bias = parameters
    num_experts = len(scale)
    outputs: list[list[Tensor]] = [[] for _ in parameters.outputs]
    for e, source, rows in experts(x, index, offsets):
        taken = take(source, rows).to(dtype)
        for i, output in enumerate(outputs):
            j = i * num_experts + e
            output.append(F.linear(taken, *folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)))
    padding = len(index) - offsets[-1]
    for width, output in zip(parameters.outputs, outputs, strict=True):
        if padding or not output:
            output.append(x[0].new_zeros((padding, x[0].shape[1], width), dtype=dtype))
    return [torch.cat(output) if len(output) > 1 else output[0] for output in outputs]


def ragged_linear_on_device(
    x: Sequence[Tensor], index: Tensor, tables: PairTables, parameters: ExpertParameters, dtype: torch.dtype
) -> list[Tensor]:
    """The same in operators alone, none of which needs the offsets on the host: one trace serves every routing."""
    scale, shift, weight, bias = parameters
    num_experts, num_pairs, first = len(scale), tables.sample.shape[0], x[0]  # len() would keep the number as it is now
    pairs = torch.arange(num_pairs, device=first.device)
    outputs = [first.new_zeros(num_pairs, first.shape[1], w.shape[0], dtype=dtype) for w in weight[::num_experts]]
    for e in range(num_experts):
        own = (pairs >= tables.expert_offsets[e]) & (pairs < tables.expert_offsets[e + 1])
        own = own.nonzero().squeeze(1)
        taken = (x[e] if len(x) > 1 else first).index_select(0, index[own]).to(dtype)
        for i, output in enumerate(outputs):
            j = i * num_experts + e
            layer = folded(scale[e], shift[e], weight[j], bias[j] if bias else None, dtype)
            outputs[i] = output.index_put((own,), F.linear(taken, *layer))
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


def forward(inputs: PairInputs, dtype: torch.dtype) -> list[Tensor]:
    """:func:`ragged_linear` for the raw op, which reads the offsets when it runs."""
    offsets = inputs.tables.expert_offsets.tolist()
    return ragged_linear(inputs.x, inputs.rows, offsets, inputs.parameters, dtype)


def layer_gradients(
    _: int, dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An expert, (R, O), (R, C), (C,), (C,), (O, C) -> gradients of weight, scale, shift and bias, fp32 or wider."""
    total = dy.sum(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    return unfolded(dy.t() @ x, total, scale, shift, weight)


def backward(
    grads: Sequence[Tensor],
    inputs: PairInputs,
    needs_x: bool,
    product: Callable[..., Tensor] = F.linear,
    gradients: Callable[..., tuple[Tensor, ...]] = layer_gradients,
) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias, in this order.

    With V = W diag(scale) and s = sum dy: dx = dy V and db = s. ``gradients`` computes the others.
    """
    x, parameters, offsets = inputs.x, inputs.parameters, inputs.tables.expert_offsets.tolist()
    num_experts = len(parameters.scale)
    grad_x = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x if needs_x else ())]
    results = parameters.like_zeros()
    for e, source, rows in experts(x, inputs.rows, offsets):
        taken = take(source, rows).flatten(0, 1)
        scale, shift = parameters.scale[e], parameters.shift[e]
        for i, grad in enumerate(grads):
            j = i * num_experts + e
            dy, weight = grad[offsets[e] : offsets[e + 1]].flatten(0, 1), parameters.weight[j]
            of_weight, of_scale, of_shift, of_bias = gradients(e, dy, taken.to(dy.dtype), scale, shift, weight)
            results.weight[j].copy_(of_weight)
            results.scale[e].add_(of_scale)
            results.shift[e].add_(of_shift)
            if results.bias:
                results.bias[j].copy_(of_bias)
            if needs_x:
                dx = product(dy, (weight * scale).to(dy.dtype).t()).to(source.dtype)
                grad_x[e if len(x) > 1 else 0].index_add_(0, rows, dx.unflatten(0, (len(rows), -1)))
    return [*grad_x, *(t for group in results for t in group)]


def unfolded(
    grad_folded: Tensor, total: Tensor, scale: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From dV = dy^T x and s = sum dy: dW = dV diag(scale) + s shift^T, dscale_c = sum_o dV_oc W_oc, dshift = W^T s."""
    grad_folded, wide = grad_folded.to(total.dtype), weight.to(total.dtype)
    grad_weight = grad_folded * scale + total[:, None] * shift
    return grad_weight, (grad_folded * wide).sum(0), total @ wide, total


def experts(x: Sequence[Tensor], index: Tensor, offsets: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, the rows of its pairs) for every expert which has pairs."""
    for e, (start, stop) in enumerate(pairwise(offsets)):
        if stop > start:
            yield e, x[e] if len(x) > 1 else x[0], index[start:stop]


def take(source: Tensor, rows: Tensor) -> Tensor:
    """These rows of the source, without a copy if they are all of it.

    Within an expert rows ascend without repeats, so as many rows as the source has are all of them, in order.
    """
    return source if rows.shape[0] == source.shape[0] else source.index_select(0, rows)
