"""expert_attention: attention of the (sample, expert) pairs, with the rotary embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from ..._checks import check, check_floats, check_tensor
from . import reference

backends.register("expert_attention")


def expert_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_heads: int, *, backend: str | None = None
) -> Tensor:
    """softmax(rope(q) rope(k)^T / sqrt(D)) v per pair and head; scores are never stored.

    A block's self-attention is the case P = B with queries, keys and values from the same tokens.

    Args:
        q, k, v: (P, L, H*D), float: projected tokens, the heads side by side.
        cos, sin: (L, D) fp32 tables of :func:`rope2d_table`.
        num_heads: H.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        (P, L, H*D) in the dtype of ``q``. Source: the MoV-Adapter of MoVA (arXiv 2404.13046).

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """
    check_floats("q", q, ("P", "L", "H*D"))
    check_tensor("k", k, tuple(q.shape))
    check_tensor("v", v, tuple(q.shape))
    check(num_heads >= 1 and q.shape[2] % num_heads == 0, "num_heads", f"must divide {q.shape[2]}", num_heads)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (q.shape[1], q.shape[2] // num_heads))
    backends.choose("expert_attention", backend, q.device, q.dtype)
    return reference.expert_attention(q, k, v, cos, sin, num_heads)
