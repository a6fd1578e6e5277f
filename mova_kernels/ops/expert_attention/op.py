"""expert_attention: attention of the (sample, expert) pairs, with the rotary embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled, _flops, _triton, backends
from ..._checks import check, check_device, check_floats, check_like, check_tensor
from ..._gradients import differentiable_again, need_reference, of_reference
from ..._library import define
from ..._plain import transformed
from . import cpu_impl, reference

LIMITS = {"head widths": {"triton": (32, 64, 128), "cuda": (64, 128), "cpu": range(2, 257, 2)}}

backends.register("expert_attention", _triton.BACKEND, _compiled.HOPPER, _compiled.BACKEND, limits=LIMITS)


def expert_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    *,
    num_valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(rope(q) rope(k)^T / sqrt(D)) v per pair and head; scores are never stored.

    A block's self-attention is the case P = B with queries, keys and values from the same tokens.

    Args:
        q, k, v: (P, L, H*D), float: projected tokens, the heads side by side; any strides.
        cos, sin: (L, D) fp32 tables of :func:`rope2d_table`; constants, they get a gradient from ``reference`` alone.
        num_heads: H.
        num_valid: (1,) int64 on q's device: the pairs behind the first ``num_valid`` are padding. ``triton`` and
            ``cpu`` skip them and give zeros, in the result and in the gradients. ``reference`` computes them.
        backend: see :mod:`mova_kernels.backends`. ``triton`` takes head widths D of 32, 64 and 128, ``cpu`` even ones
            up to 256.

    Returns:
        (P, L, H*D) in the dtype of ``q``. Source: the MoV-Adapter of MoVA (arXiv 2404.13046).

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
        backends.BackendError: the requested backend cannot run here, or not with this head width.
    """
    check_floats("q", q, ("P", "L", "H*D"))
    check_tensor("k", k, tuple(q.shape))
    check_tensor("v", v, tuple(q.shape))
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    check(num_heads >= 1 and q.shape[2] % num_heads == 0, "num_heads", f"must divide {q.shape[2]}", num_heads)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (q.shape[1], q.shape[2] // num_heads))
        check_device(name, table, "q", q)
    if num_valid is not None:
        check_tensor("num_valid", num_valid, (1,))
        check(num_valid.dtype == torch.int64, "num_valid", "must be int64", num_valid.dtype, TypeError)
        check_device("num_valid", num_valid, "q", q)
    tensors = (q, k, v, cos, sin)
    backend = backends.choose("expert_attention", backend, q.device, q.dtype, _sizes(q, num_heads), tensors)
    if backend == "reference":
        if transformed(tensors):
            return reference.expert_attention(*tensors, num_heads, stored=True)
        out = reference.expert_attention(*tensors, num_heads)
        return differentiable_again(out, lambda *t: [reference.expert_attention(*t, num_heads, stored=True)], *tensors)  # type: ignore[call-arg, misc]
    k, v = k.to(q.dtype), v.to(q.dtype)  # autocast lets them differ
    cos, sin = cos.float(), sin.float()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _ExpertAttention.apply(q, k, v, cos, sin, num_heads, num_valid, backend)[0]
    return _fwd(q, k, v, cos, sin, num_heads, num_valid, backend)[0]


def _sizes(q: Tensor, num_heads: int) -> dict[str, int]:
    return {"head widths": q.shape[2] // num_heads}


def _forward_kernel(q, k, v, cos, sin, num_heads, num_valid, backend):
    implementation = backends.implementation("expert_attention", backend, q, _sizes(q, num_heads))
    _check_num_valid(implementation, num_valid, q)
    return implementation.forward(q, k, v, cos, sin, num_heads, num_valid)


def _backward_kernel(grad, q, k, v, out, lse, cos, sin, num_heads, num_valid, backend):
    implementation = backends.implementation("expert_attention", backend, q, _sizes(q, num_heads))
    _check_num_valid(implementation, num_valid, q)
    return implementation.backward(grad, q, k, v, out, lse, cos, sin, num_heads, num_valid)


def _check_num_valid(implementation, num_valid, q):
    if num_valid is not None and implementation is cpu_impl:  # in Triton, each pair asks whether it is below
        check(
            0 <= int(num_valid) <= q.shape[0], "num_valid", f"must be from 0 to the {q.shape[0]} pairs", int(num_valid)
        )


def _forward_fake(q, k, v, cos, sin, num_heads, num_valid, backend):
    lse = q.new_empty((q.shape[0], num_heads, q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _backward_fake(grad, q, k, v, out, lse, cos, sin, num_heads, num_valid, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _flop(q, num_valid, products):
    pairs, length, channels = q.shape
    return products * 2 * _flops.valid_pairs(num_valid, pairs) * length * length * channels


# The second result is the log-sum-exp of every query's scores, (P, H, L), for the backward pass of the same backend: in
# natural units from Triton, in powers of 2 from C++ (csrc/expert_attention/expert_attention.h says why).
_fwd = define(
    "expert_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, SymInt num_heads, Tensor? num_valid, str backend)"
    " -> (Tensor, Tensor)",
    _forward_kernel,
    _forward_fake,
    lambda q, k, v, cos, sin, num_heads, num_valid, backend: _flop(q, num_valid, 2),
)
_bwd = define(
    "expert_attention_bwd",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cos, Tensor sin, SymInt num_heads,"
    " Tensor? num_valid, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
    lambda grad, q, k, v, out, lse, cos, sin, num_heads, num_valid, backend: _flop(q, num_valid, 5),
)


class _ExpertAttention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, cos, sin, num_heads, num_valid, backend):
        return _fwd(q, k, v, cos, sin, num_heads, num_valid, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, cos, sin, num_heads, num_valid, backend = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, cos, sin, num_valid)
        ctx.arguments = (num_heads, backend)

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, out, lse, cos, sin, num_valid = ctx.saved_tensors
        num_heads, backend = ctx.arguments
        if need_reference([grad]):
            function = lambda *t: [reference.expert_attention(*t, cos, sin, num_heads, stored=True)]  # type: ignore[call-arg, misc]  # noqa: E731
            gradients = of_reference(function, (q, k, v), ctx.needs_input_grad[:3], [grad])
            return *gradients, None, None, None, None, None
        grads = _bwd(grad, q, k, v, out, lse, cos, sin, num_heads, num_valid, backend)
        return *grads, None, None, None, None, None
