"""expert_attention in C++: packs the arguments for csrc/expert_attention/expert_attention.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled

_fwd = _compiled.function(
    "mk_expert_attention_fwd",
    "q k v cos sin out lse",
    "P L H D q_stride_pair q_stride_token k_stride_pair k_stride_token v_stride_pair v_stride_token dtype",
)
_bwd = _compiled.function(
    "mk_expert_attention_bwd",
    "grad q k v out lse cos sin grad_q grad_k grad_v",
    "P L H D grad_stride_pair grad_stride_token q_stride_pair q_stride_token"
    " k_stride_pair k_stride_token v_stride_pair v_stride_token dtype",
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(P, L, H*D) x 3, (L, D) fp32 x 2, (1,) int64 or None -> (P, L, H*D), log2(sum(e^score)) (P, H, L) fp32."""
    q, k, v = (_compiled.adjacent_channels(t) for t in (q, k, v))
    num_pairs, length, width = q.shape
    valid = num_pairs if num_valid is None else int(num_valid)
    out = _compiled.empty(q, *q.shape)
    lse = q.new_empty((num_pairs, num_heads, length), dtype=torch.float32)
    if valid < num_pairs:
        out[valid:], lse[valid:] = 0, 0
    _fwd(
        q=q, k=k, v=v, cos=cos.contiguous(), sin=sin.contiguous(), out=out, lse=lse,
        P=valid, L=length, H=num_heads, D=width // num_heads, dtype=q.dtype,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor, num_heads: int,
    num_valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, (P, L, H*D), contiguous; bit for bit the same at every call."""
    grad, q, k, v = (_compiled.adjacent_channels(t) for t in (grad, q, k, v))
    num_pairs, length, width = q.shape
    valid = num_pairs if num_valid is None else int(num_valid)
    grad_q, grad_k, grad_v = (_compiled.empty(q, *q.shape) for _ in range(3))
    if valid < num_pairs:
        grad_q[valid:], grad_k[valid:], grad_v[valid:] = 0, 0, 0
    _bwd(
        grad=grad, q=q, k=k, v=v, out=out.contiguous(), lse=lse.contiguous(),
        cos=cos.contiguous(), sin=sin.contiguous(), grad_q=grad_q, grad_k=grad_k, grad_v=grad_v,
        P=valid, L=length, H=num_heads, D=width // num_heads, dtype=q.dtype,
    )  # fmt: skip
    return grad_q, grad_k, grad_v
