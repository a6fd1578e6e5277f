"""expert_attention of the selected pairs, with rotary positions, against stored scores and torch's fused attention."""

from __future__ import annotations

import functools
from unittest import mock

import torch
from torch import Tensor

from benchmarks import baselines, cases
from benchmarks.cases import Case
from benchmarks.speed_test import speed_test
from benchmarks.suite import Draw, Inputs, Suite, Variant, Work, takes
from mova_kernels.dense_reference import rope_tables
from mova_kernels.ops import expert_attention, rope2d_table
from mova_kernels.ops.expert_attention import cuda_impl


def inputs(case: Case, draw: Draw) -> Inputs:
    config, pairs = case.config, int(case.selected.sum())
    qkv = [draw(pairs, config.num_tokens, case.width) for _ in range(3)]
    rounded = tuple(map(draw.cast, rope_tables(config, "cpu", qkv[0].dtype)))
    cos, sin = rope2d_table(config.resolution, config.head_channels, device=draw.device)
    return Inputs(qkv=qkv, rounded=rounded, cos=cos, sin=sin, heads=config.num_heads, leaves=qkv, reads=qkv)


def official(t: Inputs) -> Tensor:
    return baselines.attend(*t.qkv, t.heads, t.rounded, baselines.stored_scores)


def sdpa(t: Inputs) -> Tensor:
    return baselines.attend(*t.qkv, t.heads, t.rounded, baselines.sdpa)


def ours(t: Inputs, backend: str) -> Tensor:
    return expert_attention(*t.qkv, t.cos, t.sin, t.heads, backend=backend)


def in_range(t: Inputs, mode: str) -> Tensor:
    """In CUDA, with another way to keep scores in range than the default."""
    with mock.patch.dict(cuda_impl.RANGE, {torch.bfloat16: mode}):
        return ours(t, "cuda")


def cuda_in_bf16(case: Case, device: torch.device) -> str | None:
    return takes("expert_attention", "cuda")(case, device) if case.dtype == "bf16" else "the default is the only way"


def work(case: Case) -> Work:
    """The backward pass has five products for the two of the forward pass."""
    scores = int(case.selected.sum()) * case.config.num_tokens**2
    return Work(4 * scores * case.width, exps=scores * case.config.num_heads, backward=2.5)


BASELINES = [Variant("official", official), Variant("SDPA", sdpa, note=baselines.SDPA_NOTE)]
RANGES = [
    Variant(f"cuda, {mode}", functools.partial(in_range, mode=mode), ours=True, declines=cuda_in_bf16)
    for mode in cuda_impl.RANGES
    if mode != cuda_impl.RANGE[torch.bfloat16]
]
SUITE = Suite(__name__, "expert_attention", cases.ATTENTION, inputs, BASELINES, work, op=ours, ours=RANGES)
test_speed = speed_test(SUITE)
