"""expert_gate: how much each selected expert of a sample contributes."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled, _triton, backends
from ..._checks import check, check_device, check_floats, check_tensor
from ..._gradients import need_reference, of_reference
from ..._library import define
from . import reference

# One program handles the experts of a sample; in C++ they lie on the stack.
LIMITS = {"N": {"triton": range(1025), "cpu": range(1025)}}

backends.register("expert_gate", _triton.BACKEND, _compiled.BACKEND, limits=LIMITS)


def expert_gate(logits: Tensor, selected: Tensor, topk: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the selected experts, the best ``topk`` of them kept, renormalised to a sum of one.

    Args:
        logits: (B, N), float: the gate's raw scores. Those of unselected experts are ignored, whatever they are.
        selected: (B, N) bool on logits' device: the routing.
        topk: at most this many experts are kept per sample. Among equal logits the choice is torch.topk's; ``triton``
            and ``cpu`` take those with the lowest indices, and never an unselected expert for one whose logit is
            -infinity.
        backend: see :mod:`mova_kernels.backends`. ``triton`` and ``cpu`` take N up to 1024, and no fp64 logits.

    Returns:
        weights: (B, N) fp32 (fp64 for fp64 logits), exactly 0 where not kept; a row without experts is all 0.
        kept: (B, N) bool.
        Source: the gate of the MoV-Adapter, MoVA (arXiv 2404.13046). Softmax, top-k and renormalisation are the
        softmax over the kept logits. The official code adds -1e6 to unselected logits instead, which changes the
        weights by at most 1.2e-7.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device, or topk below 1.
        backends.BackendError: the requested backend cannot run here, or not with this N.
    """
    check_floats("logits", logits, ("B", "N"))
    check_tensor("selected", selected, tuple(logits.shape))
    check(selected.dtype == torch.bool, "selected", "must be bool", selected.dtype, TypeError)
    check_device("selected", selected, "logits", logits)
    check(topk >= 1, "topk", "must be at least 1", topk)
    backend = backends.choose("expert_gate", backend, logits.device, logits.dtype, _sizes(logits), (logits, selected))
    if backend == "reference":
        return reference.expert_gate(logits, selected, topk)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _ExpertGate.apply(logits, selected, topk, backend)
    return _fwd(logits, selected, topk, backend)


def _sizes(logits: Tensor) -> dict[str, int]:
    return {"N": logits.shape[1]}


def _forward_kernel(logits, selected, topk, backend):
    return backends.implementation("expert_gate", backend, logits, _sizes(logits)).forward(logits, selected, topk)


def _backward_kernel(grad, logits, kept, backend):
    return backends.implementation("expert_gate", backend, logits, _sizes(logits)).backward(grad, logits, kept)


def _forward_fake(logits, selected, topk, backend):
    return logits.new_empty(logits.shape, dtype=torch.float32), logits.new_empty(logits.shape, dtype=torch.bool)


def _backward_fake(grad, logits, kept, backend):
    return logits.new_empty(logits.shape)


_fwd = define(
    "expert_gate_fwd",
    "(Tensor logits, Tensor selected, SymInt topk, str backend) -> (Tensor, Tensor)",
    _forward_kernel,
    _forward_fake,
)
_bwd = define(
    "expert_gate_bwd",
    "(Tensor grad, Tensor logits, Tensor kept, str backend) -> Tensor",
    _backward_kernel,
    _backward_fake,
)


class _ExpertGate(torch.autograd.Function):
    @staticmethod
    def forward(logits, selected, topk, backend):
        return _fwd(logits, selected, topk, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, *_, ctx.backend = inputs
        _, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(logits, kept)

    @staticmethod
    def backward(ctx, grad, _):
        logits, kept = ctx.saved_tensors
        if need_reference([grad]):  # the softmax over those that were kept, however many
            function = lambda logits: [reference.expert_gate(logits, kept, logits.shape[1])[0]]  # noqa: E731
            return *of_reference(function, [logits], [True], [grad]), None, None, None
        return _bwd(grad, logits, kept, ctx.backend), None, None, None
