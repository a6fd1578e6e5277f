"""The definition of expert_gate, in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_gate(logits: Tensor, selected: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(B, N), (B, N) bool -> weights (B, N), kept (B, N) bool."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # In fp64: where one weight is nearly 1, the gradient w_e (g_e - sum w g) is the difference of two almost equal
    # numbers, of which fp32 leaves only noise.
    logits = torch.where(selected, logits.double(), -torch.inf)
    best = logits.topk(min(topk, logits.shape[1]), dim=1).indices
    experts = torch.arange(logits.shape[1], device=logits.device)
    kept = selected & (best[:, :, None] == experts).any(1)
    # Softmax over the kept logits; a row without any would be NaN, so it gets zeros to work on and zeros as its result.
    logits = torch.where(kept, logits, torch.where(kept.any(1, keepdim=True), -torch.inf, 0.0))
    return torch.where(kept, logits.softmax(1), 0).to(dtype), kept
