"""``python -m mova_kernels demo``: the adapter beside the dense computation of the official code, same weights.

Both sides run and are compared every time: no number that is printed or drawn was measured before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import MoVAdapter
from .config import MoVAdapterConfig
from .dense_reference import RopeTables, dense_adapter, rope_tables
from .info import cpu_name

SUMMARY = "run the adapter beside the dense computation of the official code; print and draw the comparison"
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
CPU_ORDER = (0, 2, 1, 3)  # in which samples join the dense side: also two of them have many experts and few
CUDA_PASSES = (2, 10)  # to warm up, to time
COLORS, INK = ("#1a8fe3", "#d9822b"), "#808a94"  # blue and orange for the colour-blind; all clear of white and black

Tick = Callable[[], None]


@dataclass(frozen=True)
class Measurement:
    """A pass of one side over some samples of the batch."""

    samples: tuple[int, ...]
    seconds: float
    peak_bytes: int | None  # beyond weights and inputs; None where the system cannot tell


@dataclass(frozen=True)
class Result:
    """What one run of the demo has found.

    Attributes:
        grids: side of the square grid of each expert's tokens.
        difference: the largest between the outputs, over the samples that both sides computed.
        magnitude: the largest in the dense side's outputs.
        expert_effect: the largest change of the first sample's output if its experts are left out.
        conditions: under which the time was measured.
    """

    config: MoVAdapterConfig
    grids: tuple[int, ...]
    parameters: int
    dtype: str
    device: str
    ours: Measurement
    dense: Measurement
    difference: float
    magnitude: float
    expert_effect: float
    conditions: str

    @property
    def dense_seconds(self) -> float:
        """The dense side's time, scaled to the whole batch."""
        return self.dense.seconds * len(SELECTED) / len(self.dense.samples)

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.ours.seconds

    @property
    def memory_ratio(self) -> float | None:
        ours, dense = self.ours.peak_bytes, self.dense.peak_bytes
        return dense / ours if ours and dense else None

    @property
    def caveats(self) -> list[str]:
        """What limits the meaning of the numbers, in sentences."""
        sentences = []
        if self.config != OFFICIAL[0]:
            sentences.append("A toy size: its time and memory say nothing about the official one.")
        if self.part:
            memory = ", its memory measured on those: an underestimate" if self.memory_ratio else ""
            sentences.append(f"The dense side was timed on {self.part} and scaled to {len(SELECTED)}{memory}.")
        return sentences

    @property
    def part(self) -> str | None:
        """Which part of the batch the dense side computed; None if all."""
        timed = len(self.dense.samples)
        return None if timed == len(SELECTED) else f"{timed} of {len(SELECTED)} samples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for mova-demo.png and .svg")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--quick", action="store_true", help="a toy size, to see that everything works")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> None:
    """Run, print, draw."""
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f'the demo needs {error.name}: pip install "mova-kernels[demo]"')
    args.output.mkdir(parents=True, exist_ok=True)
    # The convolutions of the dense side are linear layers on ours: TF32 in one of the two would compare two dtypes.
    torch.backends.cudnn.allow_tf32 = False
    dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    config, grids = QUICK if args.quick else OFFICIAL
    if args.quick:
        torch.set_num_threads(1)  # at that size more threads only wait for each other
    result = run(config, grids, dtype, args.device, args.seed)
    print(report(result))
    print("chart:", *draw(result, args.output))


@torch.inference_mode()
def run(config: MoVAdapterConfig, grids: Sequence[int], dtype: str, device: torch.device, seed: int = 0) -> Result:
    """Measure and compare both sides on the same weights and inputs; progress goes to stderr."""
    start = time.perf_counter()
    with _progress("building the adapter", 1) as tick:
        batch = _Batch(config, grids, DTYPES[dtype], device, seed)
        tick()
    everybody = tuple(range(len(SELECTED)))
    if device.type == "cuda":
        name, samples, (warm_up, timed) = torch.cuda.get_device_name(device), everybody, CUDA_PASSES
        conditions = f"median of {timed} passes after {warm_up} to warm up"
    else:
        name, warm_up, timed = f"{cpu_name()}, {_count(torch.get_num_threads(), 'thread')}", 0, 1
        conditions = "one pass of each side, after one block on one sample to warm up"
        with _progress("warming up", 1 + batch.dense_steps(1)) as tick:
            batch.ours_one_block()
            tick()
            trial = time.perf_counter()
            batch.dense((0,), replace(config, num_layers=1))(tick)
            per_sample = (time.perf_counter() - trial) * config.num_layers

    with _progress("mova_kernels", batch.our_steps * (warm_up + timed)) as tick, batch.watched(tick):
        ours, our_seconds, our_peak = _measure(batch.ours, device, warm_up, timed)
    without_experts = batch.first_without_experts()
    if device.type != "cuda":
        left = CPU_SECONDS - (time.perf_counter() - start)
        samples = tuple(sorted(CPU_ORDER[: max(1, round(left / per_sample))]))
    with _progress("dense", batch.dense_steps(config.num_layers) * (warm_up + timed)) as tick:
        compute = batch.dense(samples)
        dense, dense_seconds, dense_peak = _measure(lambda: compute(tick), device, warm_up, timed)

    return Result(
        config=config,
        grids=tuple(grids),
        parameters=sum(p.numel() for p in batch.adapter.parameters()),
        dtype=dtype,
        device=name,
        ours=Measurement(everybody, our_seconds, our_peak),
        dense=Measurement(samples, dense_seconds, dense_peak),
        difference=_largest(ours[list(samples)].float() - dense.float()),
        magnitude=_largest(dense),
        expert_effect=_largest(ours[:1].float() - without_experts.float()),
        conditions=conditions,
    )


def report(result: Result) -> str:
    """The result as text."""
    config, ours, dense = result.config, result.ours, result.dense
    features = {n: f"{n} {_grid(s)}x{c}" for n, s, c in zip(EXPERTS, result.grids, config.expert_channels, strict=True)}
    pairs, all_pairs = sum(map(len, SELECTED)), len(SELECTED) * len(EXPERTS)
    smaller = _gain(result.memory_ratio, "less", "more") if result.memory_ratio else ""
    rows = [
        ("", "mova_kernels", "dense", ""),
        ("expert attentions per block", f"{pairs}", f"{all_pairs}", _gain(all_pairs / pairs, "fewer", "more")),
        ("time", _seconds(ours.seconds), _seconds(result.dense_seconds), _gain(result.speedup, "faster", "slower")),
        ("peak memory", _size(ours.peak_bytes), _size(dense.peak_bytes), smaller),
    ]
    compared = f"sample{'s' if len(dense.samples) > 1 else ''} {', '.join(str(i + 1) for i in dense.samples)}"
    lines = [
        f"MoV-Adapter: {config.num_layers} blocks, {config.num_heads} heads, {_grid(config.resolution)} tokens of "
        f"width {config.in_channels} -> {config.out_channels}, {result.parameters / 1e6:.1f} M parameters",
        f"{result.dtype} on {result.device}",
        "",
        "sample  selected experts, with the grid and width of their features",
        *(f"{i:6}  {', '.join(features[n] for n in names) or 'none'}" for i, names in enumerate(SELECTED, 1)),
        "",
        *(f"{name:27}  {a:>12}  {b:>12}  {gain:>13}".rstrip() for name, a, b, gain in rows),
        "",
        f"Time: {result.conditions}. Peak memory: beyond weights and inputs.",
        *result.caveats,
        f"Largest difference of the outputs, {compared}: {result.difference:.1e} absolute, "
        f"{result.difference / result.magnitude:.1e} of the largest magnitude.",
        f"Without its experts, the output of sample 1 changes by {result.expert_effect / result.magnitude:.2f} of it.",
    ]
    return "\n".join(lines)


def draw(result: Result, directory: Path) -> tuple[Path, Path]:
    """The chart, as mova-demo.png and mova-demo.svg in ``directory``; legible on white and on black."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours, dense = result.ours, result.dense
    part = result.part or ""
    panels: list[tuple[str, tuple[float, float], Callable[[Any], str], str]] = [
        (_gain(result.speedup, "faster", "slower"), (ours.seconds, result.dense_seconds), _seconds, part and "scaled"),
    ]
    if ours.peak_bytes and dense.peak_bytes and result.memory_ratio:
        panels.append(
            (_gain(result.memory_ratio, "less memory", "more memory"), (ours.peak_bytes, dense.peak_bytes), _size, part)
        )
    figure = Figure(figsize=(10, 3.6), dpi=200)
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (gain, values, text, remark) in zip(grid, panels, strict=True):
        axes.set_axis_off()
        axes.set_xlim(0, max(values) * 1.4)
        bars = axes.barh([1, 0], values, color=COLORS, height=0.6)
        if axes is grid[0] and result.part:  # what is extrapolated looks less solid than what was measured
            bars[1].set_width(dense.seconds)
            rest = result.dense_seconds - dense.seconds
            axes.barh(0, rest, left=dense.seconds, height=0.6, fill=False, ec=COLORS[1], hatch="////", lw=0)
        put = partial(axes.annotate, textcoords="offset points", va="center", annotation_clip=False)
        for side, y, value, color in zip(("mova_kernels", "dense"), (1, 0), values, COLORS, strict=True):
            put(text(value), (value, y), (8, 0), color=color, size=14, weight="bold")
            if axes is grid[0]:
                put(side, (0, y), (-8, 0), ha="right", color=color, size=12, weight="bold")
        put(remark, (values[1], 0), (8, -16), color=INK, size=9)
        put(gain, (0, 1.7), (0, 0), color=COLORS[0], size=15, weight="bold")
    *others, last = (str(len(names)) for names in SELECTED)
    title = (
        f"MoV-Adapter on {len(SELECTED)} images that selected {', '.join(others)} and {last} of {len(EXPERTS)} experts"
    )
    figure.text(0.012, 0.92, title, color=INK, size=14, weight="bold")
    notes = [
        "dense: every expert for every image, scores materialised, as in the official code",
        f"{result.dtype} on {result.device}. Peak memory: beyond weights and inputs.",
        *result.caveats,
    ]
    figure.text(0.012, 0.18, "\n".join(notes), color=INK, size=9, va="top", linespacing=1.5)
    figure.subplots_adjust(left=0.15, right=0.99, top=0.74, bottom=0.23, wspace=0.06)
    paths = directory / "mova-demo.png", directory / "mova-demo.svg"
    for path in paths:
        figure.savefig(path)
    return paths


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
        self.routing = torch.tensor([[name in chosen for name in EXPERTS] for chosen in SELECTED])
        rows = [self.routing[:, e].nonzero().squeeze(1) for e in range(len(EXPERTS))]
        self.packed = [f[r.to(device)] if len(r) else None for f, r in zip(self.features, rows, strict=True)]
        self.rope: RopeTables = rope_tables(config, device, dtype)
        self.state = self.adapter.state_dict()
        self.our_steps = 2 * config.num_layers + 2

    def ours(self) -> Tensor:
        """Only the features of the selected experts go in."""
        return self.adapter(self.base, self.packed, self.routing, self.text)

    def ours_one_block(self) -> None:
        """Sample 0, by an adapter of one block."""
        blocks = self.adapter.blocks
        self.adapter.blocks = blocks[:1]
        self.adapter(self.base[:1], [f[:1] for f in self.features], self.routing[:1], self.text[:1])
        self.adapter.blocks = blocks

    def first_without_experts(self) -> Tensor:
        """Sample 0, as if it had selected nothing."""
        return self.adapter(self.base[:1], [None] * len(EXPERTS), torch.zeros_like(self.routing[:1]))

    def dense(self, samples: Sequence[int], config: MoVAdapterConfig | None = None) -> Callable[[Tick], Tensor]:
        """The dense computation of these samples, whose inputs are copied beforehand."""
        rows = list(samples)
        base, features, text = self.base[rows], [f[rows] for f in self.features], self.text[rows]
        routing = self.routing[rows].to(base.device)
        config = config or self.config
        return lambda tick: dense_adapter(
            _Watched(self.state, tick), config, base, features, routing, text, rope=self.rope
        )

    def dense_steps(self, num_layers: int) -> int:
        """How often a dense pass over so many blocks ticks: for each attention, feed-forward, and at the end."""
        return (len(EXPERTS) + 2) * num_layers + 1

    @contextmanager
    def watched(self, tick: Tick) -> Iterator[None]:
        """Tick ``our_steps`` times in each pass of the adapter."""
        adapter = self.adapter
        parts: list[Any] = [part for block in adapter.blocks for part in (block.self_attn, block.mlp)]
        hooks = [p.register_forward_hook(lambda *_: tick()) for p in (*parts, adapter.downsample, adapter.mlp)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Watched(dict[str, Tensor]):
    """Parameters that tell how far a function without hooks has come, by what it reads."""

    LAST = (".proj.weight", ".w3.weight", "mlp.2.weight")  # of an attention, a feed-forward, and the adapter

    def __init__(self, state: dict[str, Tensor], tick: Tick) -> None:
        super().__init__(state)
        self._tick = tick

    def __getitem__(self, name: str) -> Tensor:
        if name.endswith(self.LAST):
            self._tick()
        return super().__getitem__(name)


def _as_if_trained(name: str, noise: Tensor) -> Tensor:
    """At the official initial state every branch ends in zeros, and a comparison would prove nothing."""
    if name.endswith("weight"):
        return noise / math.sqrt(noise[0].numel()) if noise.ndim > 1 else 1 + 0.1 * noise
    return 0.1 * noise


def _measure(
    compute: Callable[[], Tensor], device: torch.device, warm_up: int, timed: int
) -> tuple[Tensor, float, int | None]:
    """The output, the median time of a pass in seconds, and the peak memory that it needs beyond what is in use."""
    for _ in range(warm_up):
        compute()
    before = _reset_peak(device)
    times = []
    for _ in range(timed):
        start = time.perf_counter()
        output = compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return output, statistics.median(times), None if before is None else _peak(device) - before


def _reset_peak(device: torch.device) -> int | None:
    """Bytes in use now, from which :func:`_peak` rises; None where the system cannot tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # What the other side has freed would stay with the allocator, and hide what this side needs.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A size from /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


@contextmanager
def _progress(what: str, total: int) -> Iterator[Tick]:
    from tqdm import tqdm

    with tqdm(total=total, desc=f"{what:20}", file=sys.stderr) as bar:

        def tick() -> None:
            bar.update()

        yield tick


def _gain(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.1f}x {better}" if ratio >= 1 else f"{1 / ratio:.1f}x {worse}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _grid(side: int) -> str:
    return f"{side}x{side}"


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _size(value: int | None) -> str:
    if value is None:
        return "not measured"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
        return device
    raise argparse.ArgumentTypeError(f"must be cpu, or cuda where PyTorch sees such a device, got {text}")
