"""The definition of swiglu_norm, in pure torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..._gradients import layer_norm


def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float, channels: int) -> Tensor:
    """LayerNorm(SiLU(gate) * up) over the first ``channels`` of the last dimension, zeros behind them."""
    padding = gate.shape[-1] - channels
    gate, up, weight, bias = (t[..., :channels] for t in (gate, up, weight, bias))
    product = F.silu(gate) * up
    normed = layer_norm(product, weight.to(product.dtype), bias.to(product.dtype), eps)
    return F.pad(normed, (0, padding)) if padding else normed
