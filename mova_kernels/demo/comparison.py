"""Runs both sides on the same weights and inputs, measures them and compares their outputs."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._measure import measure
from ..adapter import MoVAdapter
from ..config import MoVAdapterConfig
from ..dense_reference import dense_adapter, rope_tables
from ..info import cpu_name

EXPERTS = ("DINOv2", "Vary", "Co-DETR", "Pix2Struct", "Deplot", "BiomedCLIP", "SAM")
SELECTED = (("DINOv2", "Co-DETR", "SAM"), ("Vary", "Pix2Struct"), ("BiomedCLIP",), ())  # by each sample of the batch
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OFFICIAL = (MoVAdapterConfig(), (37, 32, 37, 45, 45, 14, 64))
QUICK = (
    MoVAdapterConfig(
        in_channels=32, out_channels=64, num_heads=2, num_layers=2, resolution=8, text_channels=32,
        expert_channels=(48, 16, 8, 48, 24, 24, 8),
    ),
    (6, 5, 6, 7, 7, 3, 10),
)  # fmt: skip
CPU_SECONDS = 90.0  # aimed at by a demo on a CPU, which may take two minutes on a busy machine
CUDA_PASSES = (2, 10)  # to warm up, to time

Tick = Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """The results of one run of the demo.

    Attributes:
        grids: side of the square grid of each expert's tokens.
        dense_blocks: the blocks that the dense side computed, if time did not allow for all.
        seconds: our time for the whole adapter, and the dense side's, extrapolated if it computed fewer blocks.
        dense_measured: the part of the dense side's time that was measured.
        peak_bytes: ours and the dense side's, beyond weights and inputs; None where the system cannot tell.
        difference: the largest between the outputs after ``dense_blocks`` blocks.
        magnitude: the largest in the dense side's outputs.
        expert_effect: the largest change of the first sample's output if its experts are left out.
        conditions: under which the time was measured.
    """

    config: MoVAdapterConfig
    grids: tuple[int, ...]
    parameters: int
    dtype: str
    device: str
    dense_blocks: int
    seconds: tuple[float, float]
    dense_measured: float
    peak_bytes: tuple[int, int] | None
    difference: float
    magnitude: float
    expert_effect: float
    conditions: str

    @property
    def part(self) -> str | None:
        """Which part of the adapter the dense side computed; None if all."""
        all_blocks = self.config.num_layers
        return None if self.dense_blocks == all_blocks else f"{self.dense_blocks} of {all_blocks} blocks"


@torch.inference_mode()
def compare(
    config: MoVAdapterConfig, grids: Sequence[int], dtype: str, device: torch.device, seed: int = 0
) -> Comparison:
    """Measure and compare both sides; progress goes to stderr."""
    start = time.perf_counter()
    with _progress("building the adapter", 1) as tick:
        batch = _Batch(config, grids, DTYPES[dtype], device, seed)
        tick()
    blocks = config.num_layers
    if device.type == "cuda":
        name, (warm_up, timed) = torch.cuda.get_device_name(device), CUDA_PASSES
        conditions = f"median of {timed} passes after {warm_up} to warm up"
    else:
        threads = torch.get_num_threads()
        name, warm_up, timed = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}", 0, 1
        conditions = "one pass of each side, after one block on one sample to warm up"
        with _progress("warming up", 1 + batch.dense_steps(1)) as tick:
            batch.ours(blocks=1, samples=1)
            tick()
            _, block_seconds = batch.dense(tick, blocks=1, samples=1)
    with _progress("mova_kernels", batch.our_steps(blocks) * (warm_up + timed)) as tick, batch.watched(tick):
        ours = measure(lambda: batch.ours(blocks), device, warm_up, timed)
    if device.type != "cuda":
        left = CPU_SECONDS - (time.perf_counter() - start)
        blocks = min(blocks, max(1, int(left / (block_seconds * len(SELECTED)))))
    with _progress("dense", batch.dense_steps(blocks) * (warm_up + timed)) as tick:
        dense = measure(lambda: batch.dense(tick, blocks), device, warm_up, timed)
    output, block_seconds = dense.output
    same = ours.output if blocks == config.num_layers else batch.ours(blocks)
    return Comparison(
        config=config,
        grids=tuple(grids),
        parameters=sum(p.numel() for p in batch.adapter.parameters()),
        dtype=dtype,
        device=name,
        dense_blocks=blocks,
        seconds=(ours.seconds, dense.seconds + (config.num_layers - blocks) * block_seconds),
        dense_measured=dense.seconds,
        peak_bytes=None if ours.peak_bytes is None or dense.peak_bytes is None else (ours.peak_bytes, dense.peak_bytes),
        difference=_largest(same.float() - output.float()),
        magnitude=_largest(output),
        expert_effect=_largest(same[:1].float() - batch.first_without_experts(blocks).float()),
        conditions=conditions,
    )


class _Batch:
    """An adapter with weights as if trained, a batch for it, and both ways to compute it."""

    def __init__(
        self, config: MoVAdapterConfig, grids: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):  # the official initial state would be overwritten anyway
            self.adapter = MoVAdapter(config).eval()
        self.adapter.to_empty(device="cpu")
        for name, parameter in self.adapter.named_parameters():
            parameter.copy_(_as_if_trained(name, torch.randn(parameter.shape, generator=generator)))
        self.adapter.to(device, dtype)

        def noise(*shape: int) -> Tensor:
            return torch.randn(len(SELECTED), *shape, generator=generator).to(device, dtype)

        self.config = config
        self.base, self.text = noise(config.num_tokens, config.in_channels), noise(config.text_channels)
        self.features = [noise(side * side, c) for side, c in zip(grids, config.expert_channels, strict=True)]
        self.routing = torch.tensor([[name in selected for name in EXPERTS] for selected in SELECTED])
        self.packed = [
            f[picked.to(device)] if picked.any() else None
            for f, picked in zip(self.features, self.routing.T, strict=True)
        ]
        self.rope = rope_tables(config, device, dtype)
        self.state = self.adapter.state_dict()

    def ours(self, blocks: int, samples: int = len(SELECTED)) -> Tensor:
        """The first samples through the first blocks; a whole batch brings only the features that were selected."""
        experts = self.packed if samples == len(SELECTED) else [f[:samples] for f in self.features]
        with self._truncated(blocks):
            return self.adapter(self.base[:samples], experts, self.routing[:samples], self.text[:samples])

    def first_without_experts(self, blocks: int) -> Tensor:
        """Sample 0, as if it had selected nothing."""
        with self._truncated(blocks):
            return self.adapter(self.base[:1], [None] * len(EXPERTS), torch.zeros_like(self.routing[:1]))

    def dense(self, tick: Tick, blocks: int, samples: int = len(SELECTED)) -> tuple[Tensor, float]:
        """The dense computation of the same, and the seconds that one of its blocks took."""
        watched = _Watched(self.state, tick)
        base, features, text = self.base[:samples], [f[:samples] for f in self.features], self.text[:samples]
        config, routing = replace(self.config, num_layers=blocks), self.routing[:samples].to(base.device)
        output = dense_adapter(watched, config, base, features, routing, text, rope=self.rope)
        return output, (watched.last_block - watched.first_block) / blocks

    def our_steps(self, blocks: int) -> int:
        """How often a pass ticks in :meth:`watched`."""
        return 2 * blocks + 2

    def dense_steps(self, blocks: int) -> int:
        """How often a dense pass ticks: for each attention, feed-forward, and at the end."""
        return (len(EXPERTS) + 2) * blocks + 1

    @contextmanager
    def watched(self, tick: Tick) -> Iterator[None]:
        """Tick in each pass of the adapter."""

        def note(*_: object) -> None:  # a hook's result would replace the module's output
            tick()

        adapter = self.adapter
        parts: list[Any] = [part for block in adapter.blocks for part in (block.self_attn, block.mlp)]
        hooks = [p.register_forward_hook(note) for p in (*parts, adapter.downsample, adapter.mlp)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _truncated(self, blocks: int) -> Iterator[None]:
        all_blocks = self.adapter.blocks
        self.adapter.blocks = all_blocks[:blocks]
        try:
            yield
        finally:
            self.adapter.blocks = all_blocks


class _Watched(dict[str, Tensor]):
    """Parameters by name that report progress of a function without hooks, whenever it reads one that is watched."""

    ENDS = (".proj.weight", ".w3.weight", "mlp.2.weight")  # read last in an attention, a feed-forward, the adapter

    def __init__(self, state: dict[str, Tensor], tick: Tick) -> None:
        super().__init__(state)
        self._tick = tick
        self.first_block = self.last_block = math.nan  # when the first block began, and when the last had nearly ended

    def __getitem__(self, name: str) -> Tensor:
        if name == "pos_embed":
            self.first_block = time.perf_counter()
        if name.endswith(".w3.weight"):
            self.last_block = time.perf_counter()
        if name.endswith(self.ENDS):
            self._tick()
        return super().__getitem__(name)


def _as_if_trained(name: str, noise: Tensor) -> Tensor:
    """At the official initial state every branch ends in zeros, and a comparison would prove nothing."""
    if name.endswith("weight"):
        return noise / math.sqrt(noise[0].numel()) if noise.ndim > 1 else 1 + 0.1 * noise
    return 0.1 * noise


@contextmanager
def _progress(what: str, total: int) -> Iterator[Tick]:
    from tqdm import tqdm

    with tqdm(total=total, desc=f"{what:20}", file=sys.stderr) as bar:
        yield bar.update


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
