"""expert_gate in C++: packs the arguments for csrc/expert_gate/expert_gate.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native

# logits, selected, weights, kept; B, N, four strides, topk, dtype
_fwd = _native.function("mk_expert_gate_fwd", "4Q8q")
# grad, logits, kept, grad_logits; B, N, six strides, dtype
_bwd = _native.function("mk_expert_gate_bwd", "4Q9q")


def forward(logits: Tensor, selected: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(B, N), (B, N) bool -> weights (B, N) fp32, kept (B, N) bool, contiguous."""
    weights = logits.new_empty(logits.shape, dtype=torch.float32)
    kept = logits.new_empty(logits.shape, dtype=torch.bool)
    _fwd(
        logits, selected, weights, kept,
        *logits.shape, *logits.stride(), *selected.stride(), topk, _native.DTYPES[logits.dtype],
    )  # fmt: skip
    return weights, kept


def backward(grad: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
    """Gradient of the weights (B, N) -> gradient of the logits (B, N), contiguous."""
    grad_logits = logits.new_empty(logits.shape)
    _bwd(
        grad, logits, kept, grad_logits,
        *logits.shape, *grad.stride(), *logits.stride(), *kept.stride(), _native.DTYPES[logits.dtype],
    )  # fmt: skip
    return grad_logits
