"""One block's worth of the adapter at the official width, against the official computation: 3, 2, 1 and 0 experts."""

from __future__ import annotations

import pytest
import torch

from mova_kernels import MoVAdapter, MoVAdapterConfig
from mova_kernels.dense_reference import dense_adapter, rope_tables

GRIDS = [(37, 37), (32, 32), (37, 37), (45, 45), (45, 45), (14, 14), (64, 64)]
ROUTING = torch.tensor([[1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]]).bool()


@pytest.mark.parametrize("implementation", ["official", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_one_block_of_two_samples_with_three_and_one_experts(benchmark, dtype, implementation):
    config = MoVAdapterConfig(num_layers=1)
    adapter = MoVAdapter(config).to(dtype)
    base = torch.randn(2, config.num_tokens, config.in_channels, dtype=dtype)
    text = torch.randn(2, config.text_channels, dtype=dtype)
    experts = [torch.randn(2, h * w, c, dtype=dtype) for (h, w), c in zip(GRIDS, config.expert_channels, strict=True)]
    packed = [f[ROUTING[:, e]] if ROUTING[:, e].any() else None for e, f in enumerate(experts)]
    benchmark.group = f"adapter, one block, {dtype}"
    if implementation == "adapter":
        run, arguments = adapter, (base, packed, ROUTING, text)
    else:
        rope = rope_tables(config, "cpu", dtype)
        state = adapter.state_dict()

        def run(*inputs):
            return dense_adapter(state, config, *inputs, rope=rope)

        arguments = (base, experts, ROUTING, text)
    benchmark.pedantic(run, arguments, warmup_rounds=1, rounds=3)
