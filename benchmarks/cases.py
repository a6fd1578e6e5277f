"""The sizes of all benchmarks. ``--quick`` takes those that fit into minutes on a laptop, ``--full`` takes all."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mova_kernels import MoVAdapterConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
OFFICIAL = MoVAdapterConfig()
GRIDS = (37, 32, 37, 45, 45, 14, 64)  # of the official experts, where the base grid has 48 x 48 tokens


@dataclass(frozen=True)
class Case:
    """One problem. The defaults are the dimensions of the released model.

    Attributes:
        samples: B.
        picks: K, the number of experts that each sample selects.
        experts: N. Beyond seven, the official experts' widths and grids repeat.
        side: the base grid has side x side tokens. The experts' grids keep their proportion to it.
        routing: "mixed": at random. "best": all samples select the same experts. "worst": as different as possible.
        width: C. The experts' widths keep their proportion to it.
        blocks: the number of blocks of the adapter.
        threads: the number of threads on a CPU; None for all.
        quick: whether it is part of ``--quick``.
        on_gpu: whether it needs a GPU, because it would take hours on a CPU.
    """

    dtype: str = "fp32"
    direction: str = FORWARD
    samples: int = 1
    picks: int = 3
    experts: int = 7
    side: int = 48
    routing: str = "mixed"
    width: int = 1024
    blocks: int = 1
    threads: int | None = None
    quick: bool = True
    on_gpu: bool = False

    def __str__(self) -> str:
        name = f"B{self.samples}-K{self.picks}-N{self.experts}-{self.side}x{self.side}-{self.dtype}-{self.direction}"
        rest = (self.routing if self.routing != "mixed" else "", f"{self.threads}thread" if self.threads else "")
        return "-".join(filter(None, (name, *rest)))

    @property
    def config(self) -> MoVAdapterConfig:
        def scaled(channels: int) -> int:
            return channels * self.width // OFFICIAL.in_channels

        widths = itertools.islice(itertools.cycle(OFFICIAL.expert_channels), self.experts)
        return MoVAdapterConfig(
            in_channels=self.width,
            out_channels=scaled(OFFICIAL.out_channels),
            num_heads=max(1, self.width // OFFICIAL.head_channels),
            num_layers=self.blocks,
            topk=max(OFFICIAL.topk, self.picks),
            resolution=self.side,
            text_channels=scaled(OFFICIAL.text_channels),
            expert_channels=tuple(map(scaled, widths)),
        )

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The experts' grids of tokens."""
        sides = itertools.islice(itertools.cycle(GRIDS), self.experts)
        return [(max(1, round(side * self.side / OFFICIAL.resolution)),) * 2 for side in sides]

    @functools.cached_property
    def selected(self) -> Tensor:
        """(B, N) bool on the host."""
        generator = torch.Generator().manual_seed(1110)  # the first of seven is then the largest, Pix2Struct
        mask = torch.zeros(self.samples, self.experts, dtype=torch.bool)
        same = torch.randperm(self.experts, generator=generator)
        for b in range(self.samples):
            if self.routing == "best":
                chosen = same
            elif self.routing == "worst":
                chosen = same.roll(-b * self.picks)
            else:
                chosen = torch.randperm(self.experts, generator=generator)
            mask[b, chosen[: self.picks]] = True
        return mask


TINY = Case("fp64", BOTH, samples=2, picks=2, experts=3, side=6, width=128)  # for verifying baselines


def across(base: Case, **choices) -> list[Case]:
    """``base`` with every combination of the choices."""
    return [replace(base, **dict(zip(choices, c, strict=True))) for c in itertools.product(*choices.values())]


ON_A_CPU = ("fp32", "bf16")

# The stages of one block at the official size: one sample, with one expert or three.
STAGES = [
    *across(Case(picks=1), dtype=ON_A_CPU),
    *across(Case(picks=1, quick=False), dtype=ON_A_CPU, direction=(BACKWARD, BOTH)),
    *across(Case(quick=False), dtype=ON_A_CPU, direction=(FORWARD, BOTH)),
    *across(Case(quick=False, samples=4, on_gpu=True), dtype=("bf16", "fp16"), direction=(FORWARD, BACKWARD)),
]
ATTENTION = [replace(c, quick=c.quick or (c.picks, c.dtype, c.direction) == (1, "bf16", BOTH)) for c in STAGES]
ONE_THREAD = across(Case(picks=1, threads=1), dtype=ON_A_CPU)
BLOCK = [
    *across(Case(quick=False), dtype=ON_A_CPU),
    *across(Case(samples=2, quick=False), dtype=ON_A_CPU, direction=(FORWARD, BOTH)),
]
SMALL = Case("bf16", samples=2, side=24)
FEW_EXPERTS = Case("bf16", samples=2, picks=2, experts=4, side=24)  # for which torch.compile takes half as long
LARGE = Case("bf16", blocks=3, samples=8, quick=False, on_gpu=True)
ADAPTER = [
    FEW_EXPERTS,
    *across(replace(SMALL, quick=False), dtype=ON_A_CPU),
    *across(replace(SMALL, quick=False), dtype=ON_A_CPU, direction=(BACKWARD, BOTH)),
    Case("bf16", samples=2, quick=False),
    *across(LARGE, direction=(FORWARD, BACKWARD, BOTH)),
    replace(LARGE, samples=1),
    replace(LARGE, samples=32, direction=BOTH),
]
# One quantity at a time, everything else as in SMALL.
SCALING = [
    SMALL,
    *across(SMALL, samples=(4,)),
    *across(SMALL, picks=(0,)),
    *across(SMALL, experts=(16,)),
    *across(replace(SMALL, quick=False), samples=(1, 8)),
    *across(replace(SMALL, quick=False, on_gpu=True), samples=(16, 32, 64)),
    *across(replace(SMALL, quick=False), picks=(1, 2)),
    *across(replace(SMALL, quick=False), experts=(32, 64)),
    *across(replace(SMALL, quick=False), side=(32, 40, 48, 64)),
    *across(replace(SMALL, quick=False), routing=("best", "worst")),
    *across(replace(SMALL, quick=False), direction=(BACKWARD, BOTH)),
]
