"""Predict how long the adapter takes on GPUs that this machine lacks, and write that into docs/gpu-status.md.

    python tools/predicted_times.py

tools/kernel_counts.json has the work of every kernel for each unit of a GPU. A data sheet has the rate of each unit.
The unit that is busy longest gives a lower bound of the kernel's time: all other units work at the same time, no unit
waits for memory, and launches cost nothing. The sum over the units is the time if no two units work at the same time.
Kernels take a time between the two. Products that PyTorch computes count with their FLOPs and bytes.

The counts are those of one block with one and with two samples. Each further sample adds the same, so more samples are
extrapolated. A run that launches nothing shows how often each kernel runs with three blocks.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, PICTURE = ROOT / "docs" / "gpu-status.md", ROOT / "docs" / "predicted-times.svg"
BEGIN, END = "<!-- written by tools/predicted_times.py: -->\n", "<!-- end of predicted times -->\n"
BLOCKS, EXPERTS, SAMPLES = 3, 3, (1, 8)
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Gpu:
    """Figures from data sheets and, where these lack them, from the architectures' programming guides.

    Attributes:
        flops: FLOPs of dense bf16 products per second.
        products: the same FLOPs per clock and multiprocessor. The clock follows from both.
        floats: fp32 lanes of a multiprocessor.
        memory: bytes per second.
        l2: bytes per clock that the L2 cache delivers; None if NVIDIA does not publish it; the cache is then no bound.
    """

    sm: str
    multiprocessors: int
    flops: float
    products: int
    floats: int
    memory: float
    l2: int | None = None

    @property
    def clock(self) -> float:
        return self.flops / (self.products * self.multiprocessors)


GPUS = {
    "A100": Gpu("sm_80", 108, 312e12, 2048, 64, 2.039e12, l2=5120),
    "H100": Gpu("sm_90", 132, 989.4e12, 4096, 128, 3.35e12),
    "H200": Gpu("sm_90", 132, 989.4e12, 4096, 128, 4.8e12),
    "B200": Gpu("sm_100", 148, 2250e12, 8192, 128, 8e12),
}
UNITS = {
    "products": "matrix products",
    "issue": "issue of instructions",
    "special": "exponentials and other special functions",
    "floats": "fp32 arithmetic",
    "shared": "shared memory",
    "l2": "L2 cache",
    "memory": "memory",
}
# Flash attention of Triton on an H100, head width 64, 2048 and 4096 tokens: TFLOP/s in the FlashAttention-3 paper
# (arXiv 2407.08608, its figure of forward passes without a mask).
PUBLISHED = (396, 400)


def seconds_of(figures: dict[str, float], gpu: Gpu) -> dict[str, float]:
    """How long each unit is busy with a launch. The multiprocessor with the most blocks decides."""
    rounds = math.ceil(figures["blocks"] / gpu.multiprocessors) / figures["blocks"]
    cycles = {
        "products": 2 * figures["macs"] / gpu.products,
        "issue": (figures["instructions"] - figures["move"]) / 4,  # ptxas removes most moves
        "special": figures["special"] * 32 / 16,
        "floats": figures["float"] * 32 / gpu.floats,
        "shared": figures["wavefronts"],
    }
    through_l2 = figures["read_by_blocks"] + figures["written_by_blocks"]
    return {
        **{unit: n * rounds / gpu.clock for unit, n in cycles.items()},
        "l2": through_l2 / (gpu.l2 * gpu.clock) if gpu.l2 else 0.0,
        "memory": (figures["read"] + figures["written"]) / gpu.memory,
    }


@dataclass
class Step:
    """A direction of the adapter at some number of samples: the kernels that run, and how often."""

    launches: Counter  # of kernels
    products: list[tuple[float, float]]  # FLOPs and bytes of each matrix product of PyTorch
    other_bytes: float  # moved by PyTorch's other operations


PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
VIEWS = re.compile(
    r"aten::(_?unsafe_view|view|to|detach\w*|resolve_\w+|empty\w*|as_strided\w*|t|transpose|expand\w*|reshape|slice"
    r"|select|unsqueeze|squeeze\w*|flatten|unflatten|alias|narrow|permute|resize_|_local_scalar_dense|item|result_type"
    r"|promote_types|scalar_tensor|is_\w+|split\w*|unbind|chunk|new_empty\w*|_conj|lift_fresh|contiguous)$"
)
ITEM = 2  # bytes of bf16


def step_of(events: Any, launches: list) -> Step:
    """The step that the events of PyTorch's profiler show, with bf16 sizes."""
    found = Step(Counter(name for name, *_ in launches), [], 0)
    for event in events:
        sizes = [math.prod(shape) for shape in event.input_shapes if shape]
        children = [c for c in event.cpu_children if not VIEWS.match(c.name)]
        if event.name in PRODUCTS:
            (rows, depth), (_, columns) = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            found.products.append((2 * rows * depth * columns, ITEM * (sum(sizes[-2:]) + rows * columns)))
        elif event.name.startswith("aten::") and not children and not VIEWS.match(event.name) and sizes:
            written = 0 if event.name.endswith(("fill_", "zero_")) else max(sizes)
            found.other_bytes += ITEM * (sum(sizes) + written)
    return found


def steps(samples: int) -> dict[str, Step]:
    """Forward and backward of the whole adapter, without executing its kernels."""
    from emulated_gpu import emulated_gpu
    from emulator import SETTINGS
    from kernel_counts import adapter_step, observed

    found = {}
    with emulated_gpu("sm_90"), observed() as launches, mock.patch.object(SETTINGS, "execute", False):
        for direction, call in adapter_step(samples, EXPERTS, BLOCKS).items():
            launches.clear()
            with torch.profiler.profile(record_shapes=True) as profile:
                call()
            found[direction] = step_of(profile.events(), launches)
    return found


def extrapolated(one: float, two: float, samples: int) -> float:
    return one + (samples - 1) * (two - one)


@dataclass
class Part:
    """The share of one kernel, or of PyTorch: the seconds of all its launches."""

    name: str
    bound: float
    serial: float  # the sum over the units
    unit: str


def parts(rows: list[dict], recorded: dict[int, dict[str, Step]], gpu: Gpu, direction: str, samples: int) -> list[Part]:
    """The parts of one direction."""
    one, two = ({r["kernel"]: r for r in rows if r["samples"] == n and r["direction"] == direction} for n in (1, 2))
    if one.keys() != two.keys():
        raise ValueError(f"{gpu.sm}, {direction}: other kernels for two samples: {one.keys() ^ two.keys()}")
    of_block = Counter()
    for row in one.values():
        of_block[row["kernel"].split("#")[0]] += row["launches"]
    found: list[Part] = []
    for kernel, row in one.items():
        name = kernel.split("#")[0]
        times, rest = divmod(recorded[1][direction].launches[name], of_block[name])
        if rest:
            raise ValueError(f"{name} runs {of_block[name]} times for one block, for {BLOCKS} no multiple of it")
        figures = {k: extrapolated(v, two[kernel][k], samples) for k, v in row.items() if isinstance(v, int)}
        busy = {unit: times * row["launches"] * s for unit, s in seconds_of(figures, gpu).items()}
        unit = max(busy, key=lambda u: busy[u])
        found.append(Part(name, busy[unit], sum(busy.values()), unit))
    first, second = recorded[1][direction], recorded[2][direction]
    products = {"products": 0.0, "memory": 0.0}
    for (flops, nbytes), (flops2, nbytes2) in zip(first.products, second.products, strict=True):
        computing = extrapolated(flops, flops2, samples) / gpu.flops
        moving = extrapolated(nbytes, nbytes2, samples) / gpu.memory
        products["products" if computing > moving else "memory"] += max(computing, moving)
    bound = sum(products.values())
    found.append(Part("PyTorch's matrix products", bound, bound, max(products, key=lambda u: products[u])))
    moving = extrapolated(first.other_bytes, second.other_bytes, samples) / gpu.memory
    found.append(Part("PyTorch's other operations", moving, moving, "memory"))
    return found


def merged(found: list[Part]) -> list[Part]:
    """One part for each kernel. Its unit is that of the longest launch."""
    kernels: dict[str, Part] = {}
    for part in sorted(found, key=lambda p: -p.bound):
        same = kernels.setdefault(part.name, Part(part.name, 0, 0, part.unit))
        same.bound += part.bound
        same.serial += part.serial
    return sorted(kernels.values(), key=lambda p: -p.bound)


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def text(version: str, predicted: dict[tuple[str, str, int], list[Part]], attention: dict[str, float]) -> str:
    lines = [
        "| predicted ms, at least; in brackets if no unit worked beside another | "
        + " | ".join(f"{gpu}, B={n}" for gpu in GPUS for n in SAMPLES)
        + " | measured |",
        "|---" * (2 + len(GPUS) * len(SAMPLES)) + "|",
    ]
    for direction in DIRECTIONS:
        cells = []
        for gpu in GPUS:
            for n in SAMPLES:
                found = predicted[gpu, direction, n]
                cells.append(f"{ms(sum(p.bound for p in found))} ({ms(sum(p.serial for p in found))})")
        lines.append(f"| adapter {direction} | {' | '.join(cells)} | not measured |")
    lines += ["", f"| predicted ms, at least, B={SAMPLES[-1]} | {' | '.join(GPUS)} | measured |"]
    lines += ["|---" * (2 + len(GPUS)) + "|"]
    for direction in DIRECTIONS:
        columns = {gpu: {p.name: p for p in merged(predicted[gpu, direction, SAMPLES[-1]])} for gpu in GPUS}
        for name in columns["H200"]:
            found = [columns[gpu][name] for gpu in GPUS]
            if max(p.bound for p in found) < 2e-5:
                continue
            cells = [f"{ms(p.bound)} {p.unit}" for p in found]
            lines.append(f"| {direction}: {name} | {' | '.join(cells)} | not measured |")
    rates = ", ".join(f"{gpu} {rate / 1e12:.0f}" for gpu, rate in attention.items())
    low, high = PUBLISHED
    lines += [
        "",
        f"Counts with Triton {version}. Kernels below 0.02 ms on all four are left out. "
        + "The units: "
        + "; ".join(f"{unit}: {name}" for unit, name in UNITS.items())
        + ".",
        "",
        "How far such a bound is from the truth: for the forward pass of expert_attention it says at most "
        f"{rates} TFLOP/s. Triton's own flash attention, the same algorithm at the same head width, was published with "
        f"{low} to {high} on an H100: {low / (attention['H100'] / 1e12):.2f} of the bound.",
    ]
    return "\n".join(lines) + "\n"


def attention_rate(rows: list[dict], gpu: Gpu) -> float:
    """FLOP/s of the bound of attention's forward pass over two samples' six pairs."""
    (row,) = (
        r for r in rows if (r["kernel"], r["samples"], r["direction"]) == ("expert_attention/forward", 2, "forward")
    )
    return 2 * row["macs"] / max(seconds_of(row, gpu).values())


def draw(predicted: dict[tuple[str, str, int], list[Part]]) -> None:
    """Draw a bar for each GPU and direction. Its pieces are the units that limit the kernels."""
    import matplotlib

    from benchmarks import figures

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = SAMPLES[-1]
    colors = dict(
        zip(UNITS, ("#1a8fe3", "#d9822b", "#8e5bd0", "#c8b400", "#2aa876", "#d0556b", "#808a94"), strict=True)
    )
    with figures.style():
        figure, axes = pyplot.subplots(figsize=(7.5, 3.2), layout="constrained")
        labels = [(gpu, direction) for gpu in GPUS for direction in DIRECTIONS]
        for row, (gpu, direction) in enumerate(labels):
            left, found = 0.0, predicted[gpu, direction, samples]
            for unit in UNITS:
                width = 1e3 * sum(p.bound for p in found if p.unit == unit)
                axes.barh(row, width, left=left, color=colors[unit], height=0.7)
                left += width
            axes.text(left, row, f" {left:.1f}", va="center")
        axes.set_yticks(range(len(labels)), [f"{gpu} {direction}" for gpu, direction in labels])
        axes.invert_yaxis()
        axes.set_xlabel(
            f"ms, predicted: at least so long, {samples} samples of {EXPERTS} experts, bf16, by limiting unit"
        )
        used = [u for u in UNITS if any(p.unit == u for found in predicted.values() for p in found)]
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[u]) for u in used]
        axes.legend(handles, [UNITS[u] for u in used], loc="lower right")
        figures.write(figure, PICTURE)


def main() -> None:
    from kernel_counts import BASELINE

    every = json.loads(BASELINE.read_text())
    version = max((row["triton"] for row in every), key=lambda v: [int(n) for n in v.split(".")])
    counted = [row for row in every if row["triton"] == version and row["experts"] == EXPERTS]
    recorded = {n: steps(n) for n in (1, 2)}
    of_gpu = {name: [row for row in counted if row["sm"] == gpu.sm] for name, gpu in GPUS.items()}
    predicted = {
        (name, direction, n): parts(of_gpu[name], recorded, gpu, direction, n)
        for name, gpu in GPUS.items()
        for direction in DIRECTIONS
        for n in SAMPLES
    }
    attention = {name: attention_rate(of_gpu[name], gpu) for name, gpu in GPUS.items()}
    head, rest = DOCUMENT.read_text().split(BEGIN)
    written = text(version, predicted, attention)
    DOCUMENT.write_text(head + BEGIN + written + END + rest.split(END)[1])
    draw(predicted)
    print(written, end="")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
