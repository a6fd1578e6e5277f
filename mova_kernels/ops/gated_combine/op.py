"""gated_combine: the projected results of a sample's experts, weighted by its gate and added to its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _compiled, _flops, _triton, backends
from ..._checks import check, check_device, check_floats
from ..._gradients import layer_norm, need_reference, of_reference
from ..._library import define
from ...routing import ExpertParameters, PairTables, RaggedPairs
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
    parameters = ExpertParameters(scale, shift, list(weights), list(biases))
    tensors = (x, attended, gate, *(t for group in parameters for t in group))
    sizes = _sizes(attended)
    backend = backends.choose("gated_combine", backend, attended.device, attended.dtype, sizes, tensors)
    if backend == "reference":
        return _reference(x, attended, gate, pairs.tables, pairs.host_offsets, parameters, eps)
    gate = gate.float()
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        flat = (*pairs.tables, *(t for group in parameters for t in group))
        return _GatedCombine.apply((eps, pairs.host_offsets, backend), x, attended, gate, *flat)
    return _fwd(x, attended, gate, list(pairs.tables), *parameters, eps, backend)


def _reference(x, attended, gate, tables, host_offsets, parameters, eps):
    # Every pair has its own row.
    tables = tables._replace(row=torch.arange(attended.shape[0], device=attended.device))
    normed = layer_norm(attended, eps=eps)
    (projected,) = project([normed], False, tables, host_offsets, parameters, "reference")
    return reference.gated_combine(x, projected, gate, tables.sample, host_offsets)


def _sizes(attended: Tensor) -> dict[str, int]:
    return {"attended channels": attended.shape[2]}


def _forward_kernel(x, attended, gate, tables, scale, shift, weight, bias, eps, backend):
    implementation = backends.implementation("gated_combine", backend, attended, _sizes(attended))
    parameters = ExpertParameters(scale, shift, weight, bias)
    return implementation.forward(x, attended, gate, PairTables(*tables), parameters, eps)


def _backward_kernel(grad, attended, gate, tables, scale, shift, weight, bias, eps, backend):
    implementation = backends.implementation("gated_combine", backend, attended, _sizes(attended))
    parameters = ExpertParameters(scale, shift, weight, bias)
    return implementation.backward(grad, attended, gate, PairTables(*tables), parameters, eps)


def _forward_fake(x, attended, gate, tables, scale, shift, weight, bias, eps, backend):
    return x.new_empty(x.shape)


def _backward_fake(grad, attended, gate, tables, scale, shift, weight, bias, eps, backend):
    parameters = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*scale, *shift, *weight, *bias)]
    return attended.new_empty(attended.shape), gate.new_empty(gate.shape), parameters


def _forward_flop(x, attended, gate, tables, scale, shift, weight, bias, eps, backend):
    return _flops.of_projections(tables, attended.shape[1], weight)


def _backward_flop(grad, attended, gate, tables, scale, shift, weight, bias, eps, backend):
    return 2 * _flops.of_projections(tables, attended.shape[1], weight)


_INPUTS = (
    "Tensor attended, Tensor gate, Tensor[] tables, Tensor[] scale, Tensor[] shift, Tensor[] weight, Tensor[] bias, "
    "float eps, str backend"
)
_fwd = define("gated_combine_fwd", f"(Tensor x, {_INPUTS}) -> Tensor", _forward_kernel, _forward_fake, _forward_flop)
_bwd = define(
    "gated_combine_bwd",
    f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor[])",
    _backward_kernel,
    _backward_fake,
    _backward_flop,
)
_NUM_TABLES = len(PairTables._fields)


class _GatedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x, attended, gate, *tensors):
        ctx.settings = settings
        ctx.like_x = (x.shape, x.dtype, x.device)
        ctx.save_for_backward(attended, gate, *tensors)
        return _fwd(x, attended, gate, *_groups(tensors), settings[0], settings[2])

    @staticmethod
    def backward(ctx, grad):
        attended, gate, *tensors = ctx.saved_tensors
        eps, host_offsets, backend = ctx.settings
        no_tables = (None,) * _NUM_TABLES
        if need_reference([grad]):
            shape, dtype, device = ctx.like_x
            host_offsets = host_offsets or tuple(PairTables(*tensors[:_NUM_TABLES]).expert_offsets.tolist())

            def function(attended, gate, *parameters):
                tables, *groups = _groups([*tensors[:_NUM_TABLES], *parameters])
                x = torch.zeros(shape, dtype=dtype, device=device)  # whose gradient is ``grad``
                arguments = (PairTables(*tables), host_offsets, ExpertParameters(*groups), eps)
                return [_reference(x, attended, gate, *arguments)]

            needs = ctx.needs_input_grad
            inputs, needed = (attended, gate, *tensors[_NUM_TABLES:]), (*needs[2:4], *needs[4 + _NUM_TABLES :])
            gradients = of_reference(function, inputs, needed, [grad])
            return None, grad, *gradients[:2], *no_tables, *gradients[2:]
        of_attended, of_gate, of_parameters = _bwd(grad, attended, gate, *_groups(tensors), eps, backend)
        return None, grad, of_attended, of_gate, *no_tables, *without_idle(of_parameters, host_offsets)


def _groups(tensors: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """tables, scale, shift, weight and bias from one sequence; as many parameters of each kind."""
    tables, parameters = list(tensors[:_NUM_TABLES]), tensors[_NUM_TABLES:]
    n = len(parameters) // 4
    return tables, *(list(parameters[i * n : (i + 1) * n]) for i in range(4))
