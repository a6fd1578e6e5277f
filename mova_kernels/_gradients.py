"""Gradients that no kernel computes: those of a backward pass that is itself differentiated or batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._plain import autocast, batched, other_derivatives, transformed


def need_reference(grads: Sequence[Tensor]) -> bool:
    """Whether a backward pass with these gradients is differentiated (create_graph=True) or batched."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transformed(grads) is not None or any(map(batched, grads))


def of_reference(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of ``function(*inputs)`` for the inputs that need one, differentiable any number of times.

    Args:
        function: pure torch, in which inputs that need no gradient are constants.
        inputs: as saved for the backward pass.
        needed: per input, whether its gradient is wanted.
        grads: one per result of ``function``.
    """
    with torch.enable_grad():
        # A view is a leaf of the graph that is differentiated here, and still belongs to the graph around it.
        inputs = [
            (x if x.requires_grad else x.detach().requires_grad_()).view_as(x) if wanted else x
            for x, wanted in zip(inputs, needed, strict=True)
        ]
        reached = [(y, grad) for y, grad in zip(function(*inputs), grads, strict=True) if y.requires_grad]
        if not reached:
            return [None] * len(needed)
        outputs, grads = zip(*reached, strict=True)
        leaves = [x for x, wanted in zip(inputs, needed, strict=True) if wanted]
        gradients = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=True, allow_unused=True))
    return [next(gradients) if wanted else None for wanted in needed]


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``F.layer_norm`` over the last dimension, with every derivative.

    PyTorch's own forward derivative of F.layer_norm takes mean and deviation for constants when it is differentiated
    again, so jacfwd(jacfwd(f)) and jacrev(jacfwd(f)) are wrong. Where these may be wanted, single operators compute it.
    """
    if not other_derivatives():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    wide = x.float() if narrow else x
    centred = wide - wide.mean(-1, keepdim=True)
    result = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result.to(x.dtype) if narrow and not (x.is_cuda and autocast("cuda")) else result


class _Again(torch.autograd.Function):
    """The identity on ``out``, whose gradient goes to ``out`` the first time and to the inputs of ``function`` then."""

    @staticmethod
    def forward(ctx, function, out, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        if not need_reference([grad]):
            return None, grad, *(None for _ in ctx.needs_input_grad[2:])
        inputs = ctx.saved_tensors
        return None, None, *of_reference(ctx.function, inputs, ctx.needs_input_grad[2:], [grad])


def differentiable_again(out: Tensor, function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Tensor:
    """``out``, which torch can differentiate once, with the further derivatives of ``function(*inputs)``, its equal."""
    if torch.compiler.is_compiling() or not out.requires_grad:
        return out
    return _Again.apply(function, out, *inputs)


class _WithZeroGradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, *parameters):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent, *_):
        return tangent.clone()


def with_zero_gradients(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """A copy of ``x`` whose backward pass also gives every parameter a gradient of zeros."""
    return _WithZeroGradients.apply(x, *parameters)
