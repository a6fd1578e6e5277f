"""expert_gate in C++: packs the arguments for csrc/expert_gate/expert_gate.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled

_fwd = _compiled.function(
    "mk_expert_gate_fwd",
    "logits selected weights kept",
    "B N logits_stride_sample logits_stride_expert selected_stride_sample selected_stride_expert topk dtype",
)
_bwd = _compiled.function(
    "mk_expert_gate_bwd",
    "grad logits kept grad_logits",
    "B N grad_stride_sample grad_stride_expert logits_stride_sample logits_stride_expert"
    " kept_stride_sample kept_stride_expert dtype",
)


def forward(logits: Tensor, selected: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(B, N), (B, N) bool -> weights (B, N) fp32, kept (B, N) bool, contiguous."""
    weights = logits.new_empty(logits.shape, dtype=torch.float32)
    kept = logits.new_empty(logits.shape, dtype=torch.bool)
    B, N = logits.shape
    _fwd(logits=logits, selected=selected, weights=weights, kept=kept, B=B, N=N, topk=topk, dtype=logits.dtype)
    return weights, kept


def backward(grad: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
    """Gradient of the weights (B, N) -> gradient of the logits (B, N), contiguous."""
    grad_logits = logits.new_empty(logits.shape)
    B, N = logits.shape
    _bwd(grad=grad, logits=logits, kept=kept, grad_logits=grad_logits, B=B, N=N, dtype=logits.dtype)
    return grad_logits
