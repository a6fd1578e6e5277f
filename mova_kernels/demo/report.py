"""A comparison as text and as a chart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .comparison import EXPERTS, OFFICIAL, SELECTED, Comparison

COLORS, INK = ("#1a8fe3", "#d9822b"), "#808a94"  # safe for the colour-blind, on white and on black


def text(result: Comparison) -> str:
    """Tables and what limits their meaning."""
    config, seconds, peak = result.config, result.seconds, result.peak_bytes
    features = {n: f"{n} {_grid(s)}x{c}" for n, s, c in zip(EXPERTS, result.grids, config.expert_channels, strict=True)}
    pairs, all_pairs = sum(map(len, SELECTED)), len(SELECTED) * len(EXPERTS)
    rows = [
        ("", "mova_kernels", "dense", ""),
        ("expert attentions per block", f"{pairs}", f"{all_pairs}", _gain(pairs, all_pairs, "fewer", "more")),
        ("time", *map(_seconds, seconds), _gain(*seconds, "faster", "slower")),
        ("peak memory", *map(_size, peak), _gain(*peak, "less", "more"))
        if peak
        else ("peak memory", "not measured", "", ""),
    ]
    after = f" after {result.part}" if result.part else ""
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
        *_caveats(result),
        f"Largest difference of the outputs{after}: {result.difference:.1e} absolute, "
        f"{result.difference / result.magnitude:.1e} of the largest magnitude.",
        f"Without its experts, the output of sample 1 changes by {result.expert_effect / result.magnitude:.2f} of it.",
    ]
    return "\n".join(lines)


def chart(result: Comparison, directory: Path) -> tuple[Path, Path]:
    """Bars of time and memory as mova-demo.png and .svg in ``directory``; legible on white and on black."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, tuple[float, float], Callable[[float], str]]] = [
        (_gain(*result.seconds, "faster", "slower"), result.seconds, _seconds)
    ]
    if result.peak_bytes:
        panels.append((_gain(*result.peak_bytes, "less memory", "more memory"), result.peak_bytes, _size))
    figure = Figure(figsize=(10, 3.6), dpi=200)
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (gain, values, number) in zip(grid, panels, strict=True):
        axes.set_axis_off()
        axes.set_xlim(0, max(values) * 1.4)
        bars = axes.barh([1, 0], values, color=COLORS, height=0.6)
        put = partial(axes.annotate, textcoords="offset points", va="center", annotation_clip=False)
        if axes is grid[0] and result.part:  # what is extrapolated looks less solid than what was measured
            measured, rest = result.dense_measured, result.seconds[1] - result.dense_measured
            bars[1].set_width(measured)
            axes.barh(0, rest, left=measured, height=0.6, fill=False, ec=COLORS[1], hatch="////", lw=0)
            put("extrapolated", (values[1], 0), (8, -16), color=INK, size=9)
        for side, y, value, color in zip(("mova_kernels", "dense"), (1, 0), values, COLORS, strict=True):
            put(number(value), (value, y), (8, 0), color=color, size=14, weight="bold")
            if axes is grid[0]:
                put(side, (0, y), (-8, 0), ha="right", color=color, size=12, weight="bold")
        put(gain, (0, 1.7), (0, 0), color=COLORS[0], size=15, weight="bold")
    *others, last = (str(len(names)) for names in SELECTED)
    title = (
        f"MoV-Adapter on {len(SELECTED)} images that selected {', '.join(others)} and {last} of {len(EXPERTS)} experts"
    )
    figure.text(0.012, 0.92, title, color=INK, size=14, weight="bold")
    notes = [
        "dense: every expert for every image, scores materialised, as in the official code",
        f"{result.dtype} on {result.device}. Peak memory: beyond weights and inputs.",
        *_caveats(result),
    ]
    figure.text(0.012, 0.18, "\n".join(notes), color=INK, size=9, va="top", linespacing=1.5)
    figure.subplots_adjust(left=0.15, right=0.99, top=0.74, bottom=0.23, wspace=0.06)
    paths = directory / "mova-demo.png", directory / "mova-demo.svg"
    for path in paths:
        figure.savefig(path)
    return paths


def _caveats(result: Comparison) -> list[str]:
    """What limits the meaning of the numbers, in sentences."""
    sentences = []
    if result.config != OFFICIAL[0]:
        sentences.append("A toy size: its time and memory say nothing about the official one.")
    if result.part:
        sentences.append(f"The dense side was timed on {result.part}, and its time extrapolated.")
    return sentences


def _gain(ours: float, dense: float, better: str, worse: str) -> str:
    return f"{dense / ours:.1f}x {better}" if dense >= ours else f"{ours / dense:.1f}x {worse}"


def _grid(side: int) -> str:
    return f"{side}x{side}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
