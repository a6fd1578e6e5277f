"""gated_combine: what the experts of a sample found out, weighted by its gate and added to its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _compiled, _flops, _triton, backends
from ..._checks import check, check_device, check_floats
from ..._gradients import layer_norm, need_reference, of_reference
from ..._library import define
from ...ragged import PairTables, RaggedPairs
from ..ragged_linear.op import project, without_idle
from . import reference

LIMITS = {"attended channels": {"cpu": range(1, 8193)}}

backends.register("gated_combine", _triton.BACKEND, _compiled.BACKEND, limits=LIMITS)


def gated_combine(
    x: Tensor,
    attended: Tensor,
    gate: Tensor,
    pairs: RaggedPairs,
    norms: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """y[b] = x[b] + sum over the pairs p = (b, e) of gate[p] * (LayerNorm_e(attended[p]) W_e^T + b_e).

    Args:
        x: (B, L, C) tokens, float.
        attended: (P, L, I) result of expert_attention.
        gate: (P,) weights, 0 for padding.
        pairs: the pairs.
        norms: per expert the inner LayerNorm's weight and bias, (I,) each.
        weights, biases: per expert (C, I) and (C,): the output projection.
        eps: added to the variance.
        backend: see :mod:`mova_kernels.backends`. ``cpu`` takes I from 1 to 8192.

    Returns:
        (B, L, C) in the dtype of ``x``; exactly ``x`` for a sample without pairs. Deterministic, except for the sum
        over a sample's pairs on a GPU where the host does not know the pairs.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
        backends.BackendError: the requested backend cannot run here.
    """
    check_floats("x", x, (pairs.num_samples, "L", "C"))
    check_floats("attended", attended, (pairs.num_pairs, x.shape[1], "I"))
    check_floats("gate", gate, (pairs.num_pairs,))
    for name, tensor in (("attended", attended), ("gate", gate), ("pairs", pairs.sample)):
        check_device(name, tensor, "x", x)
    lengths = [len(norms), len(weights), len(biases)]
    rule = f"must have one entry for each of {pairs.num_experts} experts"
    check(lengths == [pairs.num_experts] * 3, "norms, weights and biases", rule, lengths)
    for e, (norm, weight, bias) in enumerate(zip(norms, weights, biases, strict=True)):
        width = (attended.shape[2],)
        for name, parameter, shape in (
            (f"norms[{e}][0]", norm[0], width),
            (f"norms[{e}][1]", norm[1], width),
            (f"weights[{e}]", weight, (x.shape[2], *width)),
            (f"biases[{e}]", bias, (x.shape[2],)),
        ):
            check_floats(name, parameter, shape)
            check_device(name, parameter, "x", x)
    scale, shift = [n[0] for n in norms], [n[1] for n in norms]
    parameters = (*scale, *shift, *weights, *biases)
    chosen = backends.choose(
        "gated_combine", backend, attended.device, attended.dtype, _sizes(attended), (x, attended, gate, *parameters)
    )
    if chosen != "reference":
        gate = gate.float()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, attended, gate, *parameters)):
            return _GatedCombine.apply((eps, pairs.bounds, chosen), x, attended, gate, *pairs.tables, *parameters)
        return _fwd(x, attended, gate, list(pairs.tables), scale, shift, list(weights), list(biases), eps, chosen)
    return _reference(x, attended, gate, pairs.tables, pairs.bounds, norms, weights, biases, eps)


def _reference(x, attended, gate, tables, bounds, norms, weights, biases, eps):
    normed = layer_norm(attended, eps=eps)
    (projected,) = project([normed], "pair", tables, bounds, norms, [weights], [biases], "reference")
    return reference.gated_combine(x, projected, gate, tables.sample, bounds)


def _sizes(attended: Tensor) -> dict[str, int]:
    return {"attended channels": attended.shape[2]}


def _forward_kernel(x, attended, gate, tables, scale, shift, weight, bias, eps, backend="triton"):
    arguments = (PairTables(*tables), scale, shift, weight, bias, eps)
    return backends.implementation("gated_combine", backend, attended, _sizes(attended)).forward(
        x, attended, gate, *arguments
    )


def _backward_kernel(grad, attended, gate, tables, scale, shift, weight, bias, eps, backend="triton"):
    arguments = (PairTables(*tables), scale, shift, weight, bias, eps)
    return backends.implementation("gated_combine", backend, attended, _sizes(attended)).backward(
        grad, attended, gate, *arguments
    )


def _forward_fake(x, attended, gate, tables, scale, shift, weight, bias, eps, backend="triton"):
    return x.new_empty(x.shape)


def _backward_fake(grad, attended, gate, tables, scale, shift, weight, bias, eps, backend="triton"):
    parameters = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*scale, *shift, *weight, *bias)]
    return attended.new_empty(attended.shape), gate.new_empty(gate.shape), parameters


def _forward_flop(x, attended, gate, tables, scale, shift, weight, bias, eps, backend="triton"):
    return _flops.of_projections(attended.shape[0], attended.shape[1], tables[3], weight)


def _backward_flop(grad, attended, gate, tables, scale, shift, weight, bias, eps, backend="triton"):
    return 2 * _forward_flop(None, attended, gate, tables, scale, shift, weight, bias, eps, backend)


_INPUTS = (
    "Tensor attended, Tensor gate, Tensor[] tables, Tensor[] scale, Tensor[] shift, Tensor[] weight, Tensor[] bias, "
    'float eps, str backend="triton"'
)
_fwd = define("gated_combine_fwd", f"(Tensor x, {_INPUTS}) -> Tensor", _forward_kernel, _forward_fake, _forward_flop)
_bwd = define(
    "gated_combine_bwd",
    f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor[])",
    _backward_kernel,
    _backward_fake,
    _backward_flop,
)


class _GatedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x, attended, gate, *tensors):
        ctx.settings = settings
        ctx.like_x = (x.shape, x.dtype, x.device)
        ctx.save_for_backward(attended, gate, *tensors)
        return _fwd(x, attended, gate, *_arguments(tensors), settings[0], settings[2])

    @staticmethod
    def backward(ctx, grad):
        attended, gate, *tensors = ctx.saved_tensors
        eps, bounds, backend = ctx.settings
        no_tables = (None,) * len(PairTables._fields)
        if need_reference([grad]):
            shape, dtype, device = ctx.like_x
            tables = PairTables(*tensors[: len(no_tables)])
            bounds = bounds or tuple(tables.expert_offsets.tolist())

            def function(attended, gate, *parameters):
                scale, shift, weights, biases = _quarters(parameters)
                x = torch.zeros(shape, dtype=dtype, device=device)  # whose gradient is ``grad``
                norms = list(zip(scale, shift, strict=True))
                return [_reference(x, attended, gate, tables, bounds, norms, weights, biases, eps)]

            inputs, needs = (attended, gate, *tensors[len(no_tables) :]), ctx.needs_input_grad
            needed = (*needs[2:4], *needs[4 + len(no_tables) :])
            found = of_reference(function, inputs, needed, [grad])
            return None, grad, *found[:2], *no_tables, *found[2:]
        grad_attended, grad_gate, parameters = _bwd(grad, attended, gate, *_arguments(tensors), eps, backend)
        return None, grad, grad_attended, grad_gate, *no_tables, *without_idle(parameters, bounds)


def _arguments(tensors: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """tables, scale, shift, weight and bias from one sequence."""
    tables, parameters = list(tensors[: len(PairTables._fields)]), tensors[len(PairTables._fields) :]
    return tables, *_quarters(parameters)


def _quarters(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """scale, shift, weight and bias."""
    n = len(parameters) // 4
    return [list(parameters[i * n : (i + 1) * n]) for i in range(4)]
