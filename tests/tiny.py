"""A small adapter with trained-looking parameters and a ragged batch for it, and its fp64 truth."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mova_kernels import MoVAdapter, MoVAdapterConfig
from mova_kernels.dense_reference import dense_adapter
from testing import golden

CONFIG = MoVAdapterConfig(
    in_channels=32,
    out_channels=24,
    num_heads=2,
    num_layers=2,
    topk=2,
    resolution=6,
    text_channels=12,
    expert_channels=(20, 8, 16),
)
GRIDS = ((4, 4), (6, 6), (3, 5))  # up-sampled, already aligned, not square
ROUTING = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)


def adapter(config: MoVAdapterConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 7) -> MoVAdapter:
    """An adapter none of whose branches is zero."""
    module = MoVAdapter(config)
    module.load_state_dict(parameters(config, seed))
    return module.to(dtype)


def parameters(config: MoVAdapterConfig = CONFIG, seed: int = 7) -> dict[str, Tensor]:
    return {name: golden.parameter(name, shape, seed) for name, shape in golden.parameter_shapes(config).items()}


def inputs(
    config: MoVAdapterConfig = CONFIG,
    num_samples: int = 4,
    grids: tuple[tuple[int, int], ...] = GRIDS,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """base, dense experts, text."""
    base = golden.uniform("base", (num_samples, config.num_tokens, config.in_channels), 7)
    experts = [
        golden.uniform(f"expert.{e}", (num_samples, h * w, c), 7)
        for e, ((h, w), c) in enumerate(zip(grids, config.expert_channels, strict=True))
    ]
    text = golden.uniform("text", (num_samples, config.text_channels), 7)
    return base.to(dtype), [f.to(dtype) for f in experts], text.to(dtype)


def packed(experts: list[Tensor], routing: Tensor) -> list[Tensor | None]:
    """Only the rows which were selected; None for an expert that nobody selected."""
    return [f[routing[:, e]] if routing[:, e].any() else None for e, f in enumerate(experts)]


def truth(base, experts, routing, text, config: MoVAdapterConfig = CONFIG, grids=GRIDS, seed: int = 7, trace=None):
    """The official computation in fp64."""
    wide = {name: p.double() for name, p in parameters(config, seed).items()}
    experts = [f.double() for f in experts]
    return dense_adapter(wide, config, base.double(), experts, routing, text.double(), grids=grids, trace=trace)


def square_config(num_experts: int, **changes) -> MoVAdapterConfig:
    """CONFIG with other experts, all of width 8, for which no grids need be given."""
    return replace(CONFIG, expert_channels=(8,) * num_experts, **changes)
