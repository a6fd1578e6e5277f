"""The definition of expert_gate, in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor


def expert_gate(logits: Tensor, selected: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(B, N), (B, N) bool -> weights (B, N), kept (B, N) bool."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = torch.where(selected, logits, -torch.inf)
    best = logits.topk(min(topk, logits.shape[1]), dim=1).indices
    kept = selected & torch.zeros_like(selected).scatter(1, best, True)
    # A row without experts has no maximum: 0 stands in for it, and for the sum below, so that nothing becomes NaN.
    largest = torch.where(kept, logits, -torch.inf).amax(1, keepdim=True).detach()
    exponents = torch.where(kept, logits - largest.clamp(min=torch.finfo(logits.dtype).min), 0)
    odds = torch.where(kept, exponents.exp(), 0)
    total = odds.sum(1, keepdim=True)
    return odds / torch.where(total == 0, 1, total), kept
