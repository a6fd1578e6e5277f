"""expert_gate: the weights of a sample's experts, against the official steps."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work
from mova_kernels.dense_reference import MASKED_LOGIT
from mova_kernels.ops import expert_gate


def inputs(case: Case, draw: Draw) -> Inputs:
    logits = draw(case.samples, case.experts)
    selected = case.selected.to(draw.device)
    return Inputs(logits=logits, selected=selected, topk=case.config.topk, leaves=[logits], reads=[logits, selected])


def official(t: Inputs) -> Tensor:
    wide = t.logits if t.logits.dtype == torch.float64 else t.logits.float()
    scores = torch.softmax(wide + (1 - t.selected.to(wide.dtype)) * MASKED_LOGIT, dim=-1)
    kept = scores.topk(min(t.topk, scores.shape[-1]), dim=-1).indices
    scores = scores * torch.zeros_like(scores).scatter(-1, kept, 1.0)
    return (scores / scores.sum(dim=-1, keepdim=True)).to(t.logits.dtype)


def ours(t: Inputs, backend: str) -> Tensor:
    return expert_gate(t.logits, t.selected, t.topk, backend=backend)[0]


BASELINES = [Variant("official", official)]
SUITE = Suite(__name__, "expert_gate", cases.STAGES, inputs, BASELINES, lambda case: Work(), op=ours)
test_speed = speed_test(SUITE)
