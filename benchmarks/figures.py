"""The plots of a report. A function returns None if the results have nothing that it could show."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results_file import QUANTITIES, Case, Entry, Results, describe, seconds, si, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, PLAIN, INK = "#1a8fe3", "#d9822b", "#808a94"  # as in the demo's chart: all of them differ from white and black
KINDS = {"mova_kernels": OURS, "official computation": PLAIN, "other baselines": INK}
MARKERS = "osD^vPX<>*hp"
MODULES = ("adapter", "scaling", "block")  # suites that are no stage of a block
FAMILIES = 4  # panels of curves in one quantity


@contextmanager
def style() -> Iterator[None]:
    """A context for drawing and saving: transparent, with colours that are legible on white and on black."""
    import matplotlib

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    settings: Any = {
        **dict.fromkeys(ink, INK),
        **dict.fromkeys(clear, "none"),
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
        "xtick.minor.size": 0, "ytick.minor.size": 0,
        "font.size": 10, "legend.frameon": False, "legend.fontsize": 9, "lines.markersize": 5,
        "svg.hashsalt": "mova_kernels",  # the same results give the same file
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def adapter(results: Results) -> Figure | None:
    return _bars(results.of("adapter"), lambda e: e.median, seconds)


def memory(results: Results) -> Figure | None:
    return _bars(results.of("adapter") + results.of("block"), lambda e: e.memory, size)


def picture(case: Case, machine: str) -> Figure:
    """The variants of one case, as in the README. Those that were not measured are left out."""
    case = Case(case.suite, case.name, case.entries, ())
    figure = _figure(0.7 + 0.3 * len(case.entries), key=False)
    (axes,) = _panels(figure, [1])
    plain = case.plain

    def text(entry: Entry) -> str:
        gain = f", {plain.median / entry.median:.2f}x" if plain and entry is not plain else ""
        return seconds(entry.median) + gain

    _case_bars(axes, case, lambda e: e.median, text)
    about = f"MoV-Adapter: {describe(case.entries[0], 'device', 'threads')}"
    what = f"Median time{' and speed-up over the official computation' if plain else ''}; {machine}"
    figure.suptitle("\n".join(textwrap.fill(line, 110) for line in (about, what)), x=0.01, ha="left", size=11)
    return figure


def scaling(results: Results, quantity: str) -> Figure | None:
    families = results.families(quantity)[:FAMILIES]
    if not families:
        return None
    field = QUANTITIES[quantity]
    label = {
        "B": "samples B", "K": "experts per sample K", "N": "experts N", "L": "tokens L = side²",
    }[quantity]  # fmt: skip
    figure = _figure(3.4 * len(families), key=False)
    for axes, family in zip(_panels(figure, [1] * len(families)), families, strict=True):
        curves: dict[str, list[Entry]] = {}
        for e in sorted(family, key=lambda e: getattr(e, field)):
            curves.setdefault(e.variant, []).append(e)
        values = set()
        for marker, (variant, points) in zip(cycle(MARKERS), curves.items(), strict=False):
            if len(points) > 1:
                xs = [getattr(e, field) ** (2 if quantity == "L" else 1) for e in points]
                ours = points[0].ours
                axes.plot(
                    xs, [e.median for e in points], label=variant, color=_color(points[0]), marker=marker,
                    lw=2.5 if ours else 1.2, zorder=3 if ours else 2,
                )  # fmt: skip
                values |= set(xs)
        if quantity in "BL":
            axes.set_xscale("log")
            axes.set_yscale("log")
            _ticks(axes.yaxis, seconds)
        else:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda y, _: seconds(y) if y else "0")
        axes.set_xticks(sorted(values), [str(x) for x in sorted(values)])
        axes.minorticks_off()
        axes.set_xlabel(label)
        _title(axes, describe(family[0], field))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def stages(results: Results) -> Figure | None:
    """Each op at the official size, one panel per dtype and direction."""

    def setting(case: Case) -> tuple[str, ...]:
        e = case.entries[0]
        return tuple(str(s) for s in (e.dtype, e.direction, e.device, f"{e.threads} threads") if s != "None threads")

    cases = [c for c in results.cases if c.suite not in MODULES and c.entries and c.entries[0].official_size]
    groups = [(key, list(group)) for key, group in groupby(sorted(cases, key=setting), setting)]
    if not groups:
        return None
    rows = [len(group) for _, group in groups]
    figure = _figure(1 + 0.62 * sum(rows) + 0.5 * len(rows))
    for axes, (key, group) in zip(_panels(figure, rows), groups, strict=True):
        twice = len({c.suite for c in group}) < len(group)
        for y, case in enumerate(group):
            for offset, entry in zip((-0.27, 0, 0.27), (case.plain, case.best_baseline(), case.ours), strict=True):
                if entry:
                    axes.barh(y + offset, entry.median, height=0.25, color=_color(entry))
                    name = "" if entry.plain else f"  {entry.variant}"
                    _beside(axes, entry.median, y + offset, seconds(entry.median) + name, _color(entry), 7)
        axes.set_yticks(range(len(group)), [f"{c.suite}\n{c.name}" if twice else c.suite for c in group])
        _finish_bars(axes, len(group), max(e.median for c in group for e in (c.plain, c.best_baseline(), c.ours) if e))
        _title(axes, ", ".join(key))
    return figure


def roofline(results: Results) -> Figure | None:
    peaks = results.machine.get("peaks") or {}
    bandwidth = peaks.get("bandwidth")
    points = {
        dtype: [
            (e.flop / e.bytes, e.flop / e.median, e) for e in results.entries if e.dtype == dtype if e.flop and e.bytes
        ]
        for dtype, roof in (peaks.get("flops") or {}).items()
        if roof
    }
    points = {dtype: found for dtype, found in points.items() if found}
    if not (bandwidth and points):
        return None
    figure = _figure(5)
    markers = _suites(figure, (e for found in points.values() for *_, e in found))
    for axes, (dtype, found) in zip(_columns(figure, len(points)), points.items(), strict=True):
        roof = peaks["flops"][dtype]
        low, high = min(x for x, *_ in found) / 2, 2 * max(roof / bandwidth, *(x for x, *_ in found))
        low = min(low, roof / bandwidth / 4)
        axes.plot([low, roof / bandwidth, high], [low * bandwidth, roof, roof], color=INK, lw=1)
        _points(axes, found, markers)
        _title(axes, f"{dtype}: {si(roof, 'FLOP/s')}, {si(bandwidth, 'B/s')}")
        axes.set(xlabel="FLOP per byte of compulsory traffic", ylabel="FLOP/s")
        _ticks(axes.xaxis, lambda x: f"{x:g}")
        _ticks(axes.yaxis, lambda y: si(y, ""))
    return figure


def errors(results: Results) -> Figure | None:
    panels: dict[str, list[tuple[float, float, Entry]]] = {}
    for title, field in (("results", "error"), ("gradients, the worst one", "gradient_error")):
        pairs: Any = [(getattr(c.plain, field, None), getattr(e, field), e) for c in results.cases for e in c.entries]
        found = [p for p in pairs if not p[2].plain and all(x and math.isfinite(x) for x in p[:2])]
        if found:
            panels[title] = found
    if not panels:
        return None
    figure = _figure(4.5)
    markers = _suites(figure, (e for found in panels.values() for *_, e in found))
    for axes, (title, found) in zip(_columns(figure, len(panels)), panels.items(), strict=True):
        _points(axes, found, markers)
        ends = min(x for x, *_ in found) / 2, max(x for x, *_ in found) * 2
        for factor, line in ((1, "-"), (2, "--")):
            axes.plot(ends, [factor * x for x in ends], line, color=PLAIN, lw=1, zorder=1)
            axes.annotate(f"{factor}x", (ends[1], factor * ends[1]), color=PLAIN, size=8)
        _title(axes, title)
        axes.set(xlabel="error of the official computation", ylabel="error")
        for axis in (axes.xaxis, axes.yaxis):
            _ticks(axis, lambda x: f"{x:.0e}")
    return figure


def svg(figure: Figure, name: str) -> str:
    """For an HTML page: without the declarations of a file, with ids that no other figure has."""
    file = io.StringIO()
    _save(figure, file, "svg")
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", file.getvalue()[file.getvalue().index("<svg") :])
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def write(figure: Figure, path: Path) -> None:
    _save(figure, path, path.suffix[1:])


def _save(figure: Figure, file: Any, format: str) -> None:
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type")) if format == "svg" else None
    figure.savefig(file, format=format, dpi=150, metadata=nothing)


def _figure(height: float, key: bool = True) -> Figure:
    """10 inches wide, on the Agg canvas whatever the backend; ``key`` explains the colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, height), layout=ConstrainedLayoutEngine(h_pad=0.1))
    FigureCanvasAgg(figure)
    if key:
        handles = [Patch(color=color, label=label) for label, color in KINDS.items()]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _panels(figure: Figure, rows: list[int]) -> Iterable[Any]:
    """Axes below each other, each as high as its rows."""
    return figure.subplots(len(rows), 1, squeeze=False, height_ratios=[n + 0.8 for n in rows])[:, 0]


def _columns(figure: Figure, number: int) -> Iterable[Any]:
    return figure.subplots(1, number, squeeze=False)[0]


def _bars(cases: list[Case], value: Callable[[Entry], float | None], text: Callable[[float], str]) -> Figure | None:
    cases = [c for c in cases if any(value(e) is not None for e in c.entries)]
    if not cases:
        return None
    rows = [len(c.entries) + len(c.missing) for c in cases]
    figure = _figure(0.6 + 0.26 * sum(rows) + 0.6 * len(rows))
    for axes, case in zip(_panels(figure, rows), cases, strict=True):
        _case_bars(axes, case, value, lambda e: "not measured" if value(e) is None else text(value(e) or 0))
        _title(axes, f"{case.suite}: {describe(case.entries[0])}")
    return figure


def _case_bars(axes: Any, case: Case, value: Callable[[Entry], float | None], text: Callable[[Entry], str]) -> None:
    """The variants of a case, the smallest value first; below them those that are missing."""
    entries = sorted(case.entries, key=lambda e: math.inf if value(e) is None else value(e) or 0)
    for y, e in enumerate(entries):
        axes.barh(y, value(e) or 0, height=0.7, color=_color(e))
        _beside(axes, value(e) or 0, y, text(e), _color(e), 9, weight="bold" if e.ours else "normal")
    for y, m in enumerate(case.missing, len(entries)):
        reason = m.reason if len(m.reason) <= 70 else f"{m.reason[:67]}..."
        _beside(axes, 0, y, f"{m.outcome}: {reason}", INK, 8, style="italic")
    names = [e.variant for e in entries] + [m.variant for m in case.missing]
    axes.set_yticks(range(len(names)), names)
    for label, e in zip(axes.get_yticklabels(), entries, strict=False):
        label.set_color(_color(e))
    _finish_bars(axes, len(names), max(value(e) or 0 for e in entries))


def _finish_bars(axes: Any, rows: int, longest: float) -> None:
    """The numbers are beside the bars, so no axis is drawn. The first bar is on top."""
    axes.set_xlim(0, longest * 1.35 or 1)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _beside(axes: Any, x: float, y: float, text: str, color: str, points: int, **font: str) -> None:
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", color=color, size=points, **font)


def _points(axes: Any, points: Iterable[tuple[float, float, Entry]], markers: dict[str, str]) -> None:
    """Our points are drawn over the others; the marker shows the suite."""
    for x, y, e in sorted(points, key=lambda point: point[2].ours):
        axes.plot(x, y, marker=markers[e.suite], color=_color(e), alpha=0.9 if e.ours else 0.6, ls="none")
    axes.set(xscale="log", yscale="log")


def _suites(figure: Figure, entries: Iterable[Entry]) -> dict[str, str]:
    """A marker for each suite, with a legend beside the panels."""
    from matplotlib.lines import Line2D

    markers = dict(zip(dict.fromkeys(e.suite for e in entries), cycle(MARKERS), strict=False))
    handles = [Line2D([], [], marker=marker, color=INK, ls="none", label=suite) for suite, marker in markers.items()]
    figure.legend(handles=handles, loc="outside right center")
    return markers


def _ticks(axis: Any, text: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis, also if it spans less than a decade."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: text(value))
    axis.set_minor_formatter("")


def _title(axes: Any, text: str) -> None:
    axes.set_title(textwrap.fill(text, 80))


def _color(entry: Entry) -> str:
    return OURS if entry.ours else PLAIN if entry.plain else INK


SCALING = f"Median time of the adapter where only this quantity differs; at most {FAMILIES} settings of the others."
PLOTS: list[tuple[str, str, str, Callable[[Results], Figure | None]]] = [
    ("adapter", "The adapter", "Median time of every variant of the adapter; shorter is better.", adapter),
    *((f"scaling-{q}", f"Scaling in {q}", SCALING, partial(scaling, quantity=q)) for q in QUANTITIES),
    (
        "stages", "Stages",
        "Median time of each op at the official size: the official computation, the best other baseline, our best.",
        stages,
    ),
    (
        "roofline", "Roofline",
        "Necessary work divided by the median time, below the peaks that were measured on this machine.", roofline,
    ),
    ("memory", "Peak memory", "Beyond the inputs.", memory),
    (
        "errors", "Error against fp64",
        "Relative L2 error of every variant beside that of the official computation in the same dtype; "
        "the budget is twice the latter. An error of zero is in the table only.",
        errors,
    ),
]  # fmt: skip
