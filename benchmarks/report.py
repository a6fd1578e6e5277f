"""Writes results as one self-contained HTML page: ``python -m benchmarks.report results.json``.

The plots are in the page, and beside it as PNG. ``--again second.json`` takes another run of the same commit, and the
page then names the ratios that are not reproducible. ``--picture docs/x.svg`` only draws the variants of one case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from . import figures
from .compare import changes
from .results_file import Case, Entry, Results, ResultsError, describe, load, seconds, si, size

CSS = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto }
td, th { padding: .2rem .6rem; text-align: right; white-space: nowrap; font-weight: normal }
td:first-child, th:first-child, .text { text-align: left }
thead th { color: #808a94; border-bottom: 1px solid #808a94; white-space: normal; vertical-align: bottom }
tbody th { padding-top: .9rem; color: #808a94 }
tbody th b { color: CanvasText }
.ours { color: #1a8fe3; font-weight: bold }
.missing { color: #808a94; font-style: italic }
figure { margin: 1rem 0 2rem }
figcaption { color: #808a94 }
svg { max-width: 100%; height: auto }
"""

AGREEMENT = 0.10  # of the ratios of two runs

Column = Callable[[Entry, Case], str]


def over(entry: Entry, other: Entry | None) -> str:
    """How many times as fast as another."""
    return "" if other is None or other is entry else f"{other.median / entry.median:.2f}x"


def work(entry: Entry) -> str:
    parts = [
        si(value, unit)
        for value, unit in ((entry.flop, "FLOP"), (entry.bytes, "B"), (entry.exps, "exp"))
        if value is not None
    ]
    return ", ".join(parts)


def error(entry: Entry, case: Case, field: str) -> str:
    """An error, followed by that of the official computation."""
    value, official = getattr(entry, field), getattr(case.plain, field, None)
    if value is None:
        return ""
    return f"{value:.2e}" + (f" ({official:.2e})" if official is not None and not entry.plain else "")


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def known(value: object) -> str:
    return "" if value is None else str(value)


COLUMNS: dict[str, Column] = {
    "variant": lambda e, c: e.variant,
    "median": lambda e, c: seconds(e.median),
    "IQR": lambda e, c: seconds(e.iqr),
    "over official": lambda e, c: over(e, c.plain),
    "over best other baseline": lambda e, c: over(e, c.best_baseline(e)),
    "TFLOP/s": lambda e, c: "" if e.tflops is None else f"{e.tflops:.4g}",
    "of matrix peak": lambda e, c: share(e.peak_share),
    "of roofline": lambda e, c: share(e.roofline_share),
    "peak memory": lambda e, c: "" if e.memory is None else size(e.memory),
    "error (official)": lambda e, c: error(e, c, "error"),
    "gradient error (official)": lambda e, c: error(e, c, "gradient_error"),
    "launches": lambda e, c: known(e.launches),
    "syncs": lambda e, c: known(e.syncs),
    "rounds": lambda e, c: known(e.rounds),
    "needed": lambda e, c: work(e),
    "note": lambda e, c: known(e.note),
}
MEANING = (
    "Times are medians. Over official: how many times as fast as the official computation; over best other baseline: "
    "as the fastest baseline that is not the official one. Peak memory: beyond the inputs. Errors: relative L2 against "
    "fp64, followed by that of the official computation in the same dtype; of the gradients the worst. Needed: the "
    "least work of the ragged case, to which rates and shares refer. Empty: not measured."
)


def conditions(results: Results) -> list[tuple[str, str]]:
    """The conditions on which the numbers depend. Those that the file does not have are called unknown."""
    machine, commit = results.machine, results.commit
    peaks, clock = machine.get("peaks") or {}, machine.get("clock_mhz")
    rates = [f"{dtype} {si(rate, 'FLOP/s')}" for dtype, rate in (peaks.get("flops") or {}).items() if rate]
    rates += [si(peaks[key], unit) for key, unit in (("bandwidth", "B/s"), ("exps", "exp/s")) if peaks.get(key)]
    threads = f", {machine['threads']} threads" if machine.get("threads") else ""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    dirty = " (dirty: with changes that are not committed)" if commit.get("dirty") else ""
    return [
        ("machine", machine.get("name") or "unknown"),
        ("device", f"{machine.get('device') or 'unknown'}{threads}"),
        ("clock", f"{clock:g} MHz" if clock else "unknown"),
        ("measured peaks", ", ".join(rates) or "not measured"),
        ("versions", versions or "unknown"),
        ("commit", f"{commit.get('id') or 'unknown'}{dirty}"),
        ("date", results.date),
    ]


def reproducibility(results: Results, again: Results | None) -> str:
    """The ratios that a second run did not confirm."""
    if again is None:
        return "not measured (--again takes a second run)"
    found = changes(results, again)
    far = [f"{', '.join(c.key)} ({c.factor - 1:+.0%})" for c in found if c.exceeds(AGREEMENT, symmetric=True)]
    answer = f"{len(found) - len(far)} of {len(found)} ratios to the official computation within {AGREEMENT:.0%}"
    return f"{answer}; not {'; '.join(far)}" if far else answer


def row(cells: Iterable[str], attributes: str = "") -> str:
    return f"<tr{attributes}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def case_rows(case: Case) -> str:
    about = f": {escape(describe(case.entries[0]))}" if case.entries else ""
    lines = [f'<tr><th class="text" colspan="{len(COLUMNS)}"><b>{escape(case.name)}</b>{about}</th></tr>']
    for e in sorted(case.entries, key=lambda e: e.median):
        lines.append(row((column(e, case) for column in COLUMNS.values()), ' class="ours"' if e.ours else ""))
    for m in case.missing:
        reason = f'<td class="text" colspan="{len(COLUMNS) - 1}">{escape(f"{m.outcome}: {m.reason}")}</td>'
        lines.append(f'<tr class="missing"><td>{escape(m.variant)}</td>{reason}</tr>')
    return "\n".join(lines)


def tables(results: Results) -> str:
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    parts = []
    for suite, cases in groupby(results.cases, lambda case: case.suite):
        body = "\n".join(f"<tbody>\n{case_rows(case)}\n</tbody>" for case in cases)
        parts.append(f'<h3>{escape(suite)}</h3>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>')
        parts.append(f"{body}\n</table></div>")
    return "\n".join(parts)


def plots(results: Results, directory: Path) -> str:
    """Every plot for the page. Their PNG files are written to ``directory``."""
    parts = []
    for name, title, caption, draw in figures.PLOTS:
        parts.append(f"<h3>{title}</h3>")
        with figures.style():
            figure = draw(results)
            if figure is None:
                parts.append("<p>Not measured.</p>")
                continue
            figures.write(figure, directory / f"{name}.png")
            inline = figures.svg(figure, name)
        parts.append(f"<figure>\n<figcaption>{caption}</figcaption>\n{inline}</figure>")
    return "\n".join(parts)


def page(results: Results, directory: Path, second_run: str) -> str:
    about = "\n".join(row(pair) for pair in (*conditions(results), ("second run", second_run)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>mova_kernels: benchmarks on {escape(results.machine.get("name") or "an unknown machine")}</title>
<style>{CSS}</style>
</head>
<body>
<h1>mova_kernels: benchmarks</h1>
<table class="about">
{about}
</table>
<h2>All results, and what was not measured</h2>
<p>{MEANING}</p>
{tables(results)}
<h2>Plots</h2>
{plots(results, directory)}
</body>
</html>
"""


def pictured_case(results: Results, name: str | None) -> Case:
    """The named case of the adapter or a block of it; without a name the adapter's with the most work."""
    cases = results.of("adapter")
    if name is not None:
        cases = [c for c in (*cases, *results.of("block")) if c.name == name]
    if not cases:
        raise ResultsError(f"the adapter's case {name} was not measured" if name else "the adapter was not measured")
    return max(cases, key=lambda case: max(e.flop or 0 for e in case.entries))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON that the benchmarks have written")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="for report.html and the PNG files")
    parser.add_argument("--again", type=Path, metavar="FILE", help="results of a second run of the same commit")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="only draw the variants of one case, as SVG or PNG"
    )
    parser.add_argument("--case", help="the adapter's case in the picture; default: the one with the most work")
    args = parser.parse_args(arguments)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print('the report needs matplotlib: pip install "mova-kernels[bench]"', file=sys.stderr)
        return 2
    try:
        results = load(args.results)
        second_run = reproducibility(results, load(args.again) if args.again else None)
        if args.picture:
            machine = dict(conditions(results))
            with figures.style():
                figure = figures.picture(
                    pictured_case(results, args.case), f"{machine['machine']}, {machine['device']}"
                )
                figures.write(figure, args.picture)
            return 0
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "report.html"
    path.write_text(page(results, args.output, second_run), "utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
