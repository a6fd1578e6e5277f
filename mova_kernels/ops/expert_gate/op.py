"""expert_gate: how much each selected expert of a sample contributes."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ..._checks import check, check_floats, check_tensor
from . import reference

backends.register("expert_gate")


def expert_gate(logits: Tensor, selected: Tensor, topk: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the selected experts, the best ``topk`` of them kept, renormalised to a sum of one.

    Args:
        logits: (B, N), float: the gate's raw scores. Those of unselected experts are ignored, whatever they are.
        selected: (B, N) bool: the routing.
        topk: at most this many experts are kept per sample. Among equal logits the choice is torch.topk's.
        backend: see :mod:`mova_kernels.backends`.

    Returns:
        weights: (B, N) fp32 (fp64 for fp64 logits), exactly 0 where not kept; a row without experts is all 0.
        kept: (B, N) bool.
        Source: the gate of the MoV-Adapter, MoVA (arXiv 2404.13046). Softmax, top-k and renormalisation are the
        softmax over the kept logits. The official code adds -1e6 to unselected logits instead, which changes the
        weights by at most 1.2e-7.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape, or topk below 1.
    """
    check_floats("logits", logits, ("B", "N"))
    check_tensor("selected", selected, tuple(logits.shape))
    check(selected.dtype == torch.bool, "selected", "must be bool", selected.dtype, TypeError)
    check(topk >= 1, "topk", "must be at least 1", topk)
    backends.choose("expert_gate", backend, logits.device, logits.dtype)
    return reference.expert_gate(logits, selected, topk)
