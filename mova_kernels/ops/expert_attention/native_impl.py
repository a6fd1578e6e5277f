"""expert_attention in C++: packs the arguments for csrc/expert_attention/expert_attention.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native

# q, k, v, cos, sin, out, lse; P, L, H, D, six strides, dtype
_fwd = _native.function("mk_expert_attention_fwd", "7Q11q")

# grad, q, k, v, out, lse, cos, sin, grad_q, grad_k, grad_v; P, L, H, D, eight strides, dtype
_bwd = _native.function("mk_expert_attention_bwd", "11Q13q")


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_heads: int, count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(P, L, H*D) x 3, (L, D) fp32 x 2, (1,) int64 or None -> (P, L, H*D), and (P, H, L) fp32 for :func:`backward`."""
    q, k, v = (_native.adjacent_channels(t) for t in (q, k, v))
    num_pairs, length, width = q.shape
    used = num_pairs if count is None else int(count)
    out = _native.empty(q, *q.shape)
    lse = q.new_empty((num_pairs, num_heads, length), dtype=torch.float32)
    if used < num_pairs:
        out[used:], lse[used:] = 0, 0
    _fwd(
        q, k, v, cos.contiguous(), sin.contiguous(), out, lse,
        used, length, num_heads, width // num_heads, *_strides(q, k, v), _native.DTYPES[q.dtype],
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, num_heads: int,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, (P, L, H*D), contiguous; bit for bit the same at every call."""
    grad, q, k, v = (_native.adjacent_channels(t) for t in (grad, q, k, v))
    num_pairs, length, width = q.shape
    used = num_pairs if count is None else int(count)
    grads = _native.empty(q, *q.shape), _native.empty(q, *q.shape), _native.empty(q, *q.shape)
    if used < num_pairs:
        for g in grads:
            g[used:] = 0
    _bwd(
        grad, q, k, v, out.contiguous(), lse.contiguous(), cos.contiguous(), sin.contiguous(), *grads,
        used, length, num_heads, width // num_heads, *_strides(grad, q, k, v), _native.DTYPES[q.dtype],
    )  # fmt: skip
    return grads


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]
