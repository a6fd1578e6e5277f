"""The adapter at the official width against the official computation: samples with 3, 2, 1 and 0 experts.

All of it on a GPU; on a CPU one block, and two samples with three experts and one.
"""

from __future__ import annotations

import pytest
import torch

from mova_kernels import MoVAdapter, MoVAdapterConfig
from mova_kernels.demo.comparison import EXPERTS, OFFICIAL, SELECTED
from mova_kernels.dense_reference import dense_adapter, rope_tables

ROUTING = torch.tensor([[name in chosen for name in EXPERTS] for chosen in SELECTED])
SIZES = {"cpu": (MoVAdapterConfig(num_layers=1), ROUTING[[0, 2]]), "cuda": (MoVAdapterConfig(), ROUTING)}


@pytest.mark.parametrize("implementation", ["official", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("device", SIZES)
@torch.no_grad()
def test_forward(benchmark, device, dtype, implementation):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    config, routing = SIZES[device]
    with torch.device(device):
        adapter = MoVAdapter(config).to(dtype)
        base = torch.randn(len(routing), config.num_tokens, config.in_channels, dtype=dtype)
        text = torch.randn(len(routing), config.text_channels, dtype=dtype)
        experts = [
            torch.randn(len(routing), side * side, channels, dtype=dtype)
            for side, channels in zip(OFFICIAL[1], config.expert_channels, strict=True)
        ]
    packed = [f[picked.to(device)] if picked.any() else None for f, picked in zip(experts, routing.T, strict=True)]
    benchmark.group = f"adapter, {config.num_layers} of 3 blocks, {dtype}, {device}"
    rope, state = rope_tables(config, torch.device(device), dtype), adapter.state_dict()

    def run() -> None:
        if implementation == "adapter":
            adapter(base, packed, routing, text)
        else:
            dense_adapter(state, config, base, experts, routing.to(device), text, rope=rope)
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    benchmark.pedantic(run, rounds=3 if device == "cpu" else 10)
