"""expert_attention in CUDA C++ for Hopper (sm_90a), on torch's current stream of the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled

# How scores are kept in range (mk_attention_range of expert_attention.h says what they are).
RANGES = {"none": 0, "first": 1, "online": 2, "polynomial": 3}
# FIRST costs one instruction per score more than NONE, and never computes a tile twice for scores that are all small.
# Which is faster has not been measured.
RANGE = {torch.bfloat16: "first", torch.float16: "online"}

_SIZES = "P L H D"
_STRIDES = "q_stride_pair q_stride_token k_stride_pair k_stride_token v_stride_pair v_stride_token"
_fwd = _compiled.function(
    "mk_expert_attention_cuda_fwd",
    "q k v cos sin num_valid turned_q turned_k retry out lse",
    f"{_SIZES} {_STRIDES} range dtype device stream:uint64",
    "cuda",
)
_bwd = _compiled.function(
    "mk_expert_attention_cuda_bwd",
    "grad q k v out lse cos sin num_valid turned_q turned_k row_sums wide_heads wide_sums grad_q grad_k grad_v",
    f"{_SIZES} grad_stride_pair grad_stride_token {_STRIDES} dtype device stream:uint64",
    "cuda",
)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(P, L, H*D) x 3, fp32 tables (L, D), (1,) int64 or None -> out (P, L, H*D), log-sum-exp (P, H, L) fp32.

    The log-sum-exp is in powers of 2.
    """
    q, k, v = map(_compiled.aligned, (q, k, v))
    cos, sin = map(_compiled.aligned_table, (cos, sin))
    pairs, length = q.shape[:2]
    out, lse = q.new_empty(q.shape), q.new_empty((pairs, num_heads, length), dtype=torch.float32)
    _fwd(
        q=q, k=k, v=v, cos=cos, sin=sin, num_valid=num_valid,
        turned_q=q.new_empty(q.shape), turned_k=q.new_empty(q.shape),
        retry=q.new_empty(1 + 2 * pairs * num_heads * -(-length // 64), dtype=torch.int32),
        out=out, lse=lse, range=RANGES[RANGE[q.dtype]], **_common(q, num_heads),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, num_valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, (P, L, H*D), contiguous; bit for bit the same at every call."""
    grad, q, k, v = map(_compiled.aligned, (grad, q, k, v))
    out, cos, sin = map(_compiled.aligned_table, (out, cos, sin))
    pairs, length = q.shape[:2]
    rows = -(-length // 64) * 64
    grad_q, grad_k, grad_v = (q.new_empty(q.shape) for _ in range(3))
    _bwd(
        grad=grad, q=q, k=k, v=v, out=out, lse=lse.contiguous(), cos=cos, sin=sin, num_valid=num_valid,
        turned_q=q.new_empty(q.shape), turned_k=q.new_empty(q.shape),
        row_sums=q.new_empty((pairs, num_heads, rows, 2), dtype=torch.float32),
        wide_heads=q.new_empty((pairs, num_heads), dtype=torch.int32),
        wide_sums=q.new_empty((pairs, num_heads, 3, length), dtype=torch.float64),
        grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, **_common(q, num_heads),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _common(q: Tensor, num_heads: int) -> dict[str, object]:
    pairs, length, channels = q.shape
    device = q.get_device()
    sizes = {"P": pairs, "L": length, "H": num_heads, "D": channels // num_heads}
    return {**sizes, "dtype": q.dtype, "device": device, "stream": _compiled.cuda_stream(device)}
