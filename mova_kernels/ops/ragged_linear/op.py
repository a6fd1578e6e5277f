"""ragged_linear: the projections of the (sample, expert) pairs, every pair with the weights of its expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from ..._checks import check, check_floats, check_tensor
from ..._library import define
from ...ragged import RaggedPairs
from . import reference

backends.register("ragged_linear")


def ragged_linear(
    x: Tensor | Sequence[Tensor],
    index: Tensor | None,
    pairs: RaggedPairs,
    norms: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]] = (),
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """y_i[p] = LayerNorm_e(x[index[p]]) W_ie^T + b_ie for each pair p = (sample, expert e) and projection i.

    Args:
        x: (R, L, C) tokens that all experts share, or one (R_e, L, C_e) per expert. Only the indexed rows are read.
        index: (P,) int64: the row of ``x`` (of ``x[e]``) for each pair, ascending without repeats within an expert;
            None: row p for pair p, which needs a shared ``x``.
        pairs: the pairs.
        norms: per expert the LayerNorm's weight and bias, (C_e,) each.
        weights: per projection, per expert (O, C_e). Queries are one projection, keys and values are two.
        biases: the same with (O,); empty: none.
        eps: added to the variance.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        Per projection (P, L, O) in the dtype of its weights (under autocast: the autocast dtype). Rows behind the last
        pair are zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    sources = [x] if isinstance(x, Tensor) else list(x)
    num_experts = pairs.num_experts
    lengths = {"norms": len(norms), "weights": [len(w) for w in weights], "biases": [len(b) for b in biases]}
    right = {"norms": num_experts, "weights": [num_experts] * len(weights), "biases": [num_experts] * len(biases)}
    check(
        lengths == right, "norms, weights and biases", f"must have one entry for each of {num_experts} experts", lengths
    )
    check(
        len(biases) in (0, len(weights)), "biases", f"must be as many as weights, {len(weights)}, or none", len(biases)
    )
    check(len(sources) in (1, num_experts), "x", f"must be one tensor or {num_experts}", len(sources))
    for source in sources:
        check_floats("x", source, ("R", sources[0].shape[1], "C"))
    if index is None:
        check(isinstance(x, Tensor), "index", "must be given with one x per expert", index)
        check_tensor("x", sources[0], (pairs.num_pairs, "L", "C"))
    else:
        check_tensor("index", index, (pairs.num_pairs,))
        check(index.dtype == torch.int64, "index", "must be int64", index.dtype, TypeError)
    for e, norm in enumerate(norms):
        width = sources[e if len(sources) > 1 else 0].shape[2]
        check_tensor(f"norms[{e}][0]", norm[0], (width,))
        check_tensor(f"norms[{e}][1]", norm[1], (width,))
        for i, projection in enumerate(weights):
            check_tensor(f"weights[{i}][{e}]", projection[e], (projection[0].shape[0], width))
        for i, projection in enumerate(biases):
            check_tensor(f"biases[{i}][{e}]", projection[e], (weights[i][0].shape[0],))
    device = sources[0].device
    backends.choose("ragged_linear", backend, device, sources[0].dtype)

    norm_weight, norm_bias = [n[0] for n in norms], [n[1] for n in norms]
    weight, bias = [w for p in weights for w in p], [b for p in biases for b in p]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        weight, bias = [w.to(dtype) for w in weight], [b.to(dtype) for b in bias]
    if pairs.bounds is not None:
        arguments = (sources, index, pairs.bounds, pairs.num_pairs, norm_weight, norm_bias, eps, weight, bias)
        return tuple(reference.ragged_linear(*arguments))
    # The host does not know the pairs: the opaque op looks at the offsets when it runs.
    sizes = (len(sources), num_experts, len(weight), len(bias))
    index = torch.arange(pairs.num_pairs, device=device) if index is None else index
    return _RaggedLinear.apply(
        index, pairs.expert_offsets, eps, sizes, *sources, *norm_weight, *norm_bias, *weight, *bias
    )


def _forward_kernel(x, index, offsets, norm_weight, norm_bias, eps, weight, bias):
    bounds = offsets.tolist()
    return reference.ragged_linear(x, index, bounds, len(index), norm_weight, norm_bias, eps, weight, bias)


def _forward_fake(x, index, offsets, norm_weight, norm_bias, eps, weight, bias):
    firsts = weight[:: len(norm_weight)]
    return [w.new_empty((index.shape[0], x[0].shape[1], w.shape[0])) for w in firsts]


def _backward_kernel(grads, x, index, offsets, norm_weight, norm_bias, eps, weight, bias, needs_x):
    bounds = offsets.tolist()
    return reference.ragged_linear_backward(grads, x, index, bounds, norm_weight, norm_bias, eps, weight, bias, needs_x)


def _backward_fake(grads, x, index, offsets, norm_weight, norm_bias, eps, weight, bias, needs_x):
    inputs = (*(x if needs_x else ()), *norm_weight, *norm_bias, *weight, *bias)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


_INPUTS = (
    "Tensor[] x, Tensor index, Tensor offsets, Tensor[] norm_weight, Tensor[] norm_bias, float eps, Tensor[] weight, "
    "Tensor[] bias"
)
_fwd = define("ragged_linear_fwd", f"({_INPUTS}) -> Tensor[]", _forward_kernel, _forward_fake)
_bwd = define(
    "ragged_linear_bwd", f"(Tensor[] grads, {_INPUTS}, bool needs_x) -> Tensor[]", _backward_kernel, _backward_fake
)


class _RaggedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, offsets, eps, sizes, *tensors):
        ctx.save_for_backward(index, offsets, *tensors)
        ctx.eps, ctx.sizes = eps, sizes
        x, norm_weight, norm_bias, weight, bias = _split(tensors, sizes)
        return tuple(_fwd(x, index, offsets, norm_weight, norm_bias, eps, weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        index, offsets, *tensors = ctx.saved_tensors
        x, norm_weight, norm_bias, weight, bias = _split(tensors, ctx.sizes)
        needs_x = any(ctx.needs_input_grad[4 : 4 + len(x)])
        found = _bwd(
            [g.contiguous() for g in grads], x, index, offsets, norm_weight, norm_bias, ctx.eps, weight, bias, needs_x
        )
        return None, None, None, None, *(() if needs_x else (None,) * len(x)), *found


def _split(tensors: Sequence[Tensor], sizes: tuple[int, int, int, int]) -> list[list[Tensor]]:
    """x, norm_weight, norm_bias, weight, bias from one flat sequence."""
    num_sources, num_experts, num_weights, num_biases = sizes
    parts = []
    for size in (num_sources, num_experts, num_experts, num_weights, num_biases):
        parts.append(list(tensors[:size]))
        tensors = tensors[size:]
    return parts
