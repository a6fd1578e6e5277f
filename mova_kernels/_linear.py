"""Matrix products on CPUs: the one place that knows how to ask oneDNN for one.

For fp32, torch's own product is MKL's. oneDNN's, which torch has for its compiler, is 1.2 to 1.8 times faster on Zen 4
(benchmarks/bench_linear.py). It sums straight where MKL sums in blocks: the error is up to 2.2 times as large.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._library import functorch_active

_X86 = platform.machine() in ("x86_64", "AMD64")
_AVAILABLE = _X86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """x W^T + bias + added, not differentiable where oneDNN computes it; the sum is rounded once there.

    Args:
        x: (..., C); (C, R) transposed is as good.
        weight: (O, C), or (C, O) transposed, in the dtype of x like all others.
        bias: (O,).
        added: (..., O).

    Returns:
        (..., O), a new tensor.
    """
    # With another dtype or a strided operand, oneDNN refuses or is up to 2000 times slower.
    narrow = x.dtype == torch.bfloat16 and added is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if _has_onednn() and x.is_cpu and (x.dtype == torch.float32 or narrow) and _fit(x, weight, bias, added):
        if added is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, bias, "add")
    y = F.linear(x, weight, bias)
    return y if added is None else y + added


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, differentiable any number of times, with the products of forward and backward by :func:`product`.

    It is F.linear itself wherever something else than plain eager PyTorch on fp32 CPU tensors goes on: a compiler, an
    exporter, torch.func, forward-mode AD, autocast, a dispatch mode or a tensor subclass.
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not (_is_eager() and _has_onednn() and all(_is_plain_fp32(t) for t in operands) and _fit(x, weight, bias, None)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        # Rows go in and come out: a view made inside of a Function could not be modified in place.
        return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])
    return product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = linear(grad, weight.t()) if needs_x else None
        grad_weight = linear(grad.t(), x.t()) if needs_weight else None
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None


def _has_onednn() -> bool:
    """Whether this torch has the op, and its switches allow it."""
    return bool(_AVAILABLE and torch.backends.mkldnn.enabled and not torch.backends.mkldnn.deterministic)


def _is_eager() -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or functorch_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
    )


def _is_plain_fp32(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 and t.layout == torch.strided


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> bool:
    """Whether oneDNN takes the operands as they lie in memory, and there is something to do."""
    others = all(t is None or (t.is_contiguous() and t.dtype == x.dtype) for t in (bias, added))
    dense = x.dim() >= 2 and _is_dense(x) and _is_dense(weight)
    return others and dense and weight.dtype == x.dtype and min(x.numel(), weight.numel()) > 0


def _is_dense(t: Tensor) -> bool:
    return bool(t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous()))
