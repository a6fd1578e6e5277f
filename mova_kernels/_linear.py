"""Matrix products on CPUs: the one place that chooses between torch's and csrc/common/matmul.h.

In fp32 torch's product is MKL's, which leaves up to half of an AMD processor idle. In bf16 it is oneDNN's, which is as
fast as ours where the processor has AVX-512 with bf16, but copies a bias into the result beforehand; where it has not,
ours widens to fp32 and is several times as fast (benchmarks/bench_linear.py). Where there is AMX, oneDNN uses it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _compiled
from ._plain import is_plain, other_derivatives

_matmul = _compiled.function(
    "mk_matmul",
    "a b bias added c",
    "M N K a_stride_row a_stride_column b_stride_row b_stride_column added_stride_row c_stride_row dtype",
)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x W^T + bias + added, not differentiable. Where torch computes it, bf16 and fp16 also round bias + added.

    Args:
        x: (..., C), at least two dimensions, any strides, like all others.
        weight: (O, C), in the dtype of x like all others.
        bias: (O,).
        added: (..., O).
        out: (..., O), contiguous: takes the result. May be ``added``.

    Returns:
        (..., O): ``out``, or a new tensor.
    """
    ours = _is_ours(x, weight)
    if out is None:
        out = (_compiled.empty if ours else Tensor.new_empty)(x, *x.shape[:-1], weight.shape[0])
    rows, result = _rows(x), _rows(out)
    added = None if added is None else _rows(added)
    depth = x.shape[-1]
    if ours and depth:  # without channels (no rows in a gradient), torch gives zeros
        bias = None if bias is None else bias.contiguous()
        added = None if added is None else _compiled.adjacent_channels(added)
        M, N = result.shape
        _matmul(a=rows, b=weight.t(), bias=bias, added=added, c=result, M=M, N=N, K=depth, dtype=x.dtype)
    elif bias is None and added is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        addends = [t for t in (bias, added) if t is not None]
        torch.addmm(sum(addends[1:], start=addends[0]), rows, weight.t(), out=result)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, differentiable any number of times, with the products of forward and backward by :func:`product`.

    It calls F.linear itself unless this is eager PyTorch on plain fp32 or bf16 CPU tensors: not under a compiler, an
    exporter, torch.func, forward-mode AD, autocast or a dispatch mode, and not for tensor subclasses or tensors whose
    memory holds other numbers.
    """
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not (_is_eager() and x.dim() > 1 and all(map(is_plain, operands)) and _is_ours(*operands)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        # The Function takes and returns rows: a view made inside of it could not be modified in place.
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


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(0, -2)


def _is_ours(*operands: Tensor) -> bool:
    """Whether C++ takes the product. Without vector instructions beyond SSE2, torch's is faster."""
    dtype = operands[0].dtype
    for t in operands:
        if t.dtype != dtype or not t.is_cpu:
            return False
    if _compiled.cpu_reason() is not None or _compiled.cpu_isa() == "base":
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and not _has_amx())


@functools.cache
def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, and younger than the oldest torch
    return supported is not None and supported()


def _is_eager() -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or other_derivatives()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
    )
