"""What a careful user of PyTorch would write instead: the baselines that are not the official computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mova_kernels import MoVAdapterConfig

EPS = 1e-5


def rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """The official rotation of (..., L, D), step by step."""
    cos, sin = tables
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin


def sdpa(q: Tensor, k: Tensor, v: Tensor, num_heads: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """(P, L, H*D) x 3 -> (P, L, H*D): rotation, then torch's fused attention."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(rope(q, tables), rope(k, tables), v)
    return out.transpose(1, 2).flatten(2)


def ragged_block(
    p: Mapping[str, Tensor],
    config: MoVAdapterConfig,
    x: Tensor,
    features: Sequence[Tensor],
    routing: Tensor,
    text: Tensor,
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    """One block of the adapter: per expert a gather of its samples, SDPA, and an addition to their tokens.

    ``p`` holds the parameters by their names within the block; ``features`` are (B_e, L, C_e), the selected rows only.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], EPS)

    def attention(name: str, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.q_proj", x), linear(f"{name}.k_proj", context), linear(f"{name}.v_proj", context)
        return linear(f"{name}.proj", norm(f"{name}.inner_attn_ln", sdpa(q, k, v, config.num_heads, tables)))

    logits = linear("gate.2", F.gelu(linear("gate.0", torch.cat([text, x.mean(1)], -1)))).float()
    weights = logits.masked_fill(~routing, -torch.inf).softmax(-1).to(x.dtype)  # K is at most topk here
    fused = x
    for e, feature in enumerate(features):
        rows = routing[:, e].nonzero().squeeze(1)
        if len(rows):
            out = attention(f"cross_attn.{e}", norm(f"norm1.{e}", x[rows]), norm(f"norm2.{e}", feature))
            fused = fused.index_add(0, rows, weights[rows, e, None, None] * out)
    normed = norm("norm3", fused)
    fused = fused + attention("self_attn", normed, normed)
    x = norm("norm4", fused)
    return fused + linear("mlp.w3", norm("mlp.ffn_ln", F.silu(linear("mlp.w1", x)) * linear("mlp.w2", x)))
