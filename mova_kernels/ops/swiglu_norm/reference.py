"""The definition of swiglu_norm, in pure torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(SiLU(gate) * up) over the last dimension."""
    product = F.silu(gate) * up
    return F.layer_norm(product, product.shape[-1:], weight.to(product.dtype), bias.to(product.dtype), eps)
