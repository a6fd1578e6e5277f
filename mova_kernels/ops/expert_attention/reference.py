"""The definition of expert_attention, in pure torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..rope2d.reference import rope2d


def expert_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_heads: int, stored: bool = False
) -> Tensor:
    """(P, L, H*D) x 3 -> (P, L, H*D).

    With ``stored`` scores it can be differentiated in every way. Without, torch may choose an implementation that knows
    one backward pass alone.
    """
    q, k, v = (t.unflatten(2, (num_heads, -1)) for t in (q, k, v))
    q, k = rope2d(q, cos, sin), rope2d(k, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if stored:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
