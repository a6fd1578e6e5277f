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
    pairs: RaggedPairs,
    affines: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]] = (),
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """y_i[p] = (x_p g_e + b_e) W_ie^T + c_ie for each pair p = (sample, expert e) and projection i.

    With ``x`` normalised and (g, b) the affine part of a LayerNorm this is LayerNorm and Linear. The affine part is
    folded into the weights: W diag(g) and W b + c. Source: the MoV-Adapter of MoVA (arXiv 2404.13046).

    Args:
        x: (B, L, C): the tokens of each sample, which its pairs share; or per expert (R_e, L, C_e), of which a pair
            takes the row ``pairs.row``. Only these rows are read.
        pairs: the pairs.
        affines: per expert g and b, (C_e,) each.
        weights: per projection, per expert W, (O, C_e). Queries are one projection, keys and values are two.
        biases: the same with c, (O,); empty: none.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        Per projection (P, L, O) in the dtype of the weights (under autocast: the autocast dtype). Rows behind the last
        pair are zeros.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    shared = isinstance(x, Tensor)
    sources = [x] if isinstance(x, Tensor) else list(x)
    check(shared or len(sources) == pairs.num_experts, "x", f"must be one tensor or {pairs.num_experts}", len(sources))
    for e, source in enumerate(sources):
        name = "x" if shared else f"x[{e}]"
        check_floats(name, source, (pairs.num_samples if shared else "R", sources[0].shape[1], "C"))
    widths = [source.shape[2] for source in sources] * (pairs.num_experts if shared else 1)
    _check_parameters(widths, affines, weights, biases)
    backends.choose("ragged_linear", backend, sources[0].device, sources[0].dtype)
    return project(sources, pairs.sample if shared else pairs.row, pairs, affines, weights, biases)


def _check_parameters(
    widths: Sequence[int],
    affines: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]],
) -> None:
    n = len(widths)
    lengths = {"affines": len(affines), "weights": [len(w) for w in weights], "biases": [len(b) for b in biases]}
    right = {"affines": n, "weights": [n] * len(weights), "biases": [n] * len(biases)}
    check(lengths == right, "affines, weights and biases", f"must have one entry for each of {n} experts", lengths)
    rule = f"must be as many as weights, {len(weights)}, or none"
    check(len(biases) in (0, len(weights)), "biases", rule, len(biases))
    for e, width in enumerate(widths):
        check_tensor(f"affines[{e}][0]", affines[e][0], (width,))
        check_tensor(f"affines[{e}][1]", affines[e][1], (width,))
        for i, projection in enumerate(weights):
            check_tensor(f"weights[{i}][{e}]", projection[e], (projection[0].shape[0], width))
        for i, projection in enumerate(biases):
            check_tensor(f"biases[{i}][{e}]", projection[e], (weights[i][0].shape[0],))


def project(
    sources: Sequence[Tensor],
    index: Tensor | None,
    pairs: RaggedPairs,
    affines: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor]] = (),
) -> tuple[Tensor, ...]:
    """The reference for one shared source or one per expert; ``index`` None: pair p takes row p.

    Within an expert the index ascends without repeats.
    """
    scale, shift = [a[0] for a in affines], [a[1] for a in affines]
    weight, bias = [w for p in weights for w in p], [b for p in biases for b in p]
    device = weight[0].device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight[0].dtype
    if pairs.bounds is not None:
        arguments = (sources, index, pairs.bounds, pairs.num_pairs, scale, shift, weight, bias, dtype)
        return tuple(reference.ragged_linear(*arguments))
    # The host does not know the pairs: the opaque op looks at the offsets when it runs.
    sizes = (len(sources), len(scale), len(weight), len(bias))
    index = torch.arange(pairs.num_pairs, device=device) if index is None else index
    return _RaggedLinear.apply(index, pairs.expert_offsets, dtype, sizes, *sources, *scale, *shift, *weight, *bias)


def _forward_kernel(x, index, offsets, scale, shift, weight, bias, dtype):
    return reference.ragged_linear(x, index, offsets.tolist(), len(index), scale, shift, weight, bias, dtype)


def _forward_fake(x, index, offsets, scale, shift, weight, bias, dtype):
    firsts = weight[:: len(scale)]
    return [w.new_empty((index.shape[0], x[0].shape[1], w.shape[0]), dtype=dtype) for w in firsts]


def _backward_kernel(grads, x, index, offsets, scale, shift, weight, bias, needs_x):
    return reference.ragged_linear_backward(grads, x, index, offsets.tolist(), scale, shift, weight, bias, needs_x)


def _backward_fake(grads, x, index, offsets, scale, shift, weight, bias, needs_x):
    inputs = (*(x if needs_x else ()), *scale, *shift, *weight, *bias)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


_INPUTS = "Tensor[] x, Tensor index, Tensor offsets, Tensor[] scale, Tensor[] shift, Tensor[] weight, Tensor[] bias"
_fwd = define("ragged_linear_fwd", f"({_INPUTS}, ScalarType dtype) -> Tensor[]", _forward_kernel, _forward_fake)
_bwd = define(
    "ragged_linear_bwd", f"(Tensor[] grads, {_INPUTS}, bool needs_x) -> Tensor[]", _backward_kernel, _backward_fake
)


class _RaggedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index, offsets, dtype, sizes, *tensors):
        ctx.save_for_backward(index, offsets, *tensors)
        ctx.sizes = sizes
        return tuple(_fwd(*_arguments(index, offsets, tensors, sizes), dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        index, offsets, *tensors = ctx.saved_tensors
        num_sources = ctx.sizes[0]
        needs_x = any(ctx.needs_input_grad[4 : 4 + num_sources])
        found = _bwd([g.contiguous() for g in grads], *_arguments(index, offsets, tensors, ctx.sizes), needs_x)
        return None, None, None, None, *(() if needs_x else (None,) * num_sources), *found


def _arguments(index: Tensor, offsets: Tensor, tensors: Sequence[Tensor], sizes: tuple[int, int, int, int]) -> tuple:
    """What the raw ops take first; ``tensors`` are x, scale, shift, weight and bias in one sequence."""
    num_sources, num_experts, num_weights, num_biases = sizes
    parts = []
    for size in (num_sources, num_experts, num_experts, num_weights, num_biases):
        parts.append(list(tensors[:size]))
        tensors = tensors[size:]
    x, *parameters = parts
    return x, index, offsets, *parameters
