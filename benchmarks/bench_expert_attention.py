"""expert_attention of one pair at the official size against SDPA with eager rotation, and the official computation."""

from __future__ import annotations

import baselines
import pytest
import torch
from torch import Tensor

from mova_kernels import MoVAdapterConfig, backends
from mova_kernels.dense_reference import rope_tables
from mova_kernels.ops import expert_attention, rope2d_table

CONFIG = MoVAdapterConfig()
HEADS, LENGTH, WIDTH = CONFIG.num_heads, CONFIG.num_tokens, CONFIG.in_channels


def official(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Scores are stored."""
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    q, k = baselines.rope(q, tables), baselines.rope(k, tables)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("implementation", ["official", "sdpa", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_pair(benchmark, dtype, direction, implementation):
    """(1, 2304, 16 * 64), forward alone or with all gradients."""
    if implementation == "cpu":
        try:
            backends.choose("expert_attention", "cpu", torch.device("cpu"), dtype)
        except backends.BackendError as error:
            pytest.skip(str(error))
    inputs = [torch.randn(1, LENGTH, WIDTH, dtype=dtype, requires_grad=direction == "both") for _ in range(3)]
    rounded, tables = rope_tables(CONFIG, "cpu", dtype), rope2d_table(CONFIG.resolution, WIDTH // HEADS)
    grad = torch.randn(1, LENGTH, WIDTH, dtype=dtype)
    benchmark.group = f"expert_attention (1, {HEADS}, {LENGTH}, {WIDTH // HEADS}) {dtype} {direction}"
    benchmark.extra_info["threads"] = torch.get_num_threads()

    def forward() -> Tensor:
        if implementation == "official":
            return official(*inputs, rounded)
        if implementation == "sdpa":
            return baselines.sdpa(*inputs, HEADS, rounded)
        return expert_attention(*inputs, *tables, HEADS, backend="cpu")

    def run() -> None:
        out = forward()
        if direction == "both":
            torch.autograd.grad(out, inputs, grad)

    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
