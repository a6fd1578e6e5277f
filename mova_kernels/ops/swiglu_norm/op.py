"""swiglu_norm: the elementwise middle of the SwiGLU feed-forward with its sub-LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled, _triton, backends
from ..._checks import check, check_device, check_floats
from ..._gradients import need_reference, of_reference
from ..._library import define
from . import reference

# Triton keeps a token in the registers of one program, C++ on the stack.
LIMITS = {"F": {"triton": range(4097), "cpu": range(8193)}}

backends.register("swiglu_norm", _triton.BACKEND, _compiled.BACKEND, limits=LIMITS)


def swiglu_norm(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    channels: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(SiLU(gate) * up).

    Args:
        gate, up: (B, L, F), float: the two projections of the tokens; any strides.
        weight, bias: (F,) of the LayerNorm, on gate's device; their dtype may be another one (autocast).
        eps: added to the variance.
        channels: how many of the F channels count, by default all. The others only align rows in memory: they are
            ignored, and zeros in the result and the gradients.
        backend: see :mod:`mova_kernels.backends`. ``triton`` takes F up to 4096, ``cpu`` up to 8192; both compute in
            fp32 and round once, where ``reference`` rounds the product to the dtype of ``gate``.

    Returns:
        (B, L, F) in the dtype of ``gate``. Source: SwiGLU (arXiv 2002.05202) with the sub-LN of EVA-02.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.
        backends.BackendError: the requested backend cannot run here, or not with this F.
    """
    check_floats("gate", gate, ("B", "L", "F"))
    check_floats("up", up, tuple(gate.shape))
    check_floats("weight", weight, (gate.shape[2],))
    check_floats("bias", bias, (gate.shape[2],))
    for name, tensor in (("up", up), ("weight", weight), ("bias", bias)):
        check_device(name, tensor, "gate", gate)
    channels = gate.shape[2] if channels is None else channels
    check(0 <= channels <= gate.shape[2], "channels", f"must be from 0 to {gate.shape[2]}", channels)
    backend = backends.choose("swiglu_norm", backend, gate.device, gate.dtype, _sizes(gate), (gate, up, weight, bias))
    if backend == "reference":
        return reference.swiglu_norm(gate, up, weight, bias, eps, channels)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (gate, up, weight, bias)):
        return _SwigluNorm.apply(gate, up, weight, bias, eps, channels, backend)[0]
    return _fwd(gate, up, weight, bias, eps, channels, backend)[0]


def _sizes(gate: Tensor) -> dict[str, int]:
    return {"F": gate.shape[2]}


def _forward_kernel(gate, up, weight, bias, eps, channels, backend):
    return backends.implementation("swiglu_norm", backend, gate, _sizes(gate)).forward(
        gate, up, weight, bias, eps, channels
    )


def _backward_kernel(grad, gate, up, weight, mean, rstd, channels, backend):
    return backends.implementation("swiglu_norm", backend, gate, _sizes(gate)).backward(
        grad, gate, up, weight, mean, rstd, channels
    )


def _forward_fake(gate, up, weight, bias, eps, channels, backend):
    mean, rstd = (gate.new_empty(gate.shape[:2], dtype=torch.float32) for _ in range(2))
    return gate.new_empty(gate.shape), mean, rstd


def _backward_fake(grad, gate, up, weight, mean, rstd, channels, backend):
    grad_weight, grad_bias = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return gate.new_empty(gate.shape), up.new_empty(up.shape), grad_weight, grad_bias


_fwd = define(
    "swiglu_norm_fwd",
    "(Tensor gate, Tensor up, Tensor weight, Tensor bias, float eps, SymInt channels, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward_kernel,
    _forward_fake,
)
_bwd = define(
    "swiglu_norm_bwd",
    "(Tensor grad, Tensor gate, Tensor up, Tensor weight, Tensor mean, Tensor rstd, SymInt channels, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)


class _SwigluNorm(torch.autograd.Function):
    @staticmethod
    def forward(gate, up, weight, bias, eps, channels, backend):
        return _fwd(gate, up, weight, bias, eps, channels, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, up, weight, bias, ctx.eps, *ctx.settings = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(gate, up, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype

    @staticmethod
    def backward(ctx, grad, *_):
        # Read once: activation checkpointing refuses a second time.
        gate, up, weight, mean, rstd = ctx.saved_tensors
        if need_reference([grad]):
            bias = torch.zeros_like(weight, dtype=ctx.bias_dtype)  # the gradient does not depend on it
            settings = (ctx.eps, ctx.settings[0])
            inputs, needed = (gate, up, weight, bias), ctx.needs_input_grad[:4]
            gradients = of_reference(lambda *t: [reference.swiglu_norm(*t, *settings)], inputs, needed, [grad])  # type: ignore[call-arg]
            return *gradients, None, None, None
        grad_gate, grad_up, grad_weight, grad_bias = _bwd(grad, gate, up, weight, mean, rstd, *ctx.settings)
        return grad_gate, grad_up, grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype), None, None, None
