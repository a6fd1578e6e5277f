"""Reads a file of results: pytest-benchmark's JSON with the additions of the suites."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

OFFICIAL_SIZE = {"side": 48, "width": 1024}  # MoVAdapterConfig's; importing it would ask every reader for PyTorch
QUANTITIES = {"B": "samples", "K": "picks", "N": "experts", "L": "side"}
PARAMETERS = (
    *QUANTITIES.values(), "width", "dtype", "direction", "routing", "blocks", "device", "threads",
)  # fmt: skip


class ResultsError(Exception):
    """A file cannot be used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One variant of one case. None means that a value was not measured or does not exist.

    Attributes:
        plain: whether it is the official computation, to which speed-ups and errors refer.
        picks: experts per sample.
        side: the side of the square grid of tokens.
        flop, bytes, exps: the least work of the case, whatever the variant does.
        memory: peak bytes beyond the inputs.
        error, gradient_error: relative L2 error against fp64; that of the worst gradient.
        median, iqr: seconds.
    """

    suite: str
    case: str
    variant: str
    kind: str
    median: float
    iqr: float
    plain: bool = False
    rounds: int | None = None
    samples: int | None = None
    picks: int | None = None
    experts: int | None = None
    side: int | None = None
    width: int | None = None
    dtype: str | None = None
    direction: str | None = None
    routing: str | None = None
    threads: int | None = None
    device: str | None = None
    blocks: int | None = None
    flop: int | None = None
    bytes: int | None = None
    exps: int | None = None
    tflops: float | None = None
    peak_share: float | None = None
    roofline_share: float | None = None
    memory: int | None = None
    error: float | None = None
    gradient_error: float | None = None
    launches: int | None = None
    syncs: int | None = None
    note: str | None = None

    @property
    def ours(self) -> bool:
        return self.kind == "ours"

    @property
    def official_size(self) -> bool:
        return all(getattr(self, name) == value for name, value in OFFICIAL_SIZE.items())


@dataclass(frozen=True)
class Missing:
    """A variant that was skipped or failed."""

    suite: str
    case: str
    variant: str
    kind: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Case:
    """All variants of one case."""

    suite: str
    name: str
    entries: tuple[Entry, ...]
    missing: tuple[Missing, ...]

    @cached_property
    def plain(self) -> Entry | None:
        return next((e for e in self.entries if e.plain), None)

    @cached_property
    def ours(self) -> Entry | None:
        """The fastest of our variants."""
        return min((e for e in self.entries if e.ours), key=lambda e: e.median, default=None)

    def best_baseline(self, other_than: Entry | None = None) -> Entry | None:
        """The fastest variant that is neither ours nor the official computation."""
        found = (e for e in self.entries if not e.ours and not e.plain and e is not other_than)
        return min(found, key=lambda e: e.median, default=None)


@dataclass(frozen=True)
class Results:
    """A file of results, with ``machine``, ``versions`` and ``commit`` as in the file."""

    entries: list[Entry]
    missing: list[Missing]
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any]
    date: str

    @cached_property
    def cases(self) -> list[Case]:
        """Suite by suite, the adapter first and its blocks second."""
        everything: list[Entry | Missing] = [*self.entries, *self.missing]
        suites = dict.fromkeys(["adapter", "scaling", "block", *(e.suite for e in everything)])
        names = dict.fromkeys((e.suite, e.case) for e in everything)
        return [
            Case(
                suite,
                name,
                tuple(e for e in self.entries if (e.suite, e.case) == (suite, name)),
                tuple(m for m in self.missing if (m.suite, m.case) == (suite, name)),
            )
            for suite, name in sorted(names, key=lambda key: list(suites).index(key[0]))
        ]

    def of(self, suite: str) -> list[Case]:
        """The cases of a suite in which something was measured."""
        return [c for c in self.cases if c.suite == suite and c.entries]

    def families(self, quantity: str) -> list[list[Entry]]:
        """Entries of suite "scaling" that differ only in this quantity and the variant, the longest groups first."""
        field = QUANTITIES[quantity]
        found: dict[tuple, list[Entry]] = {}
        for e in self.entries:
            if e.suite == "scaling" and getattr(e, field) is not None:
                found.setdefault(tuple(getattr(e, p) for p in PARAMETERS if p != field), []).append(e)
        counts = [(max(Counter(e.variant for e in family).values()), family) for family in found.values()]
        return [family for n, family in sorted(counts, key=lambda x: -x[0]) if n > 1]


def load(path: Path) -> Results:
    """Read a file of results.

    Raises:
        ResultsError: it cannot be read, has no benchmarks, or has one without a description.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or not data.get("benchmarks"):
        raise ResultsError(f"{path}: has no benchmarks")
    entries = [_entry(path, benchmark) for benchmark in data["benchmarks"]]
    seen, plain = set(), set()
    for e in entries:
        if (key := (e.suite, e.case, e.variant)) in seen:
            raise ResultsError(f"{path}: {', '.join(key)} is there twice")
        seen.add(key)
        if e.plain and (e.suite, e.case) in plain:
            raise ResultsError(f"{path}: {e.suite}, {e.case} has more than one plain variant")
        if e.plain:
            plain.add((e.suite, e.case))
    try:
        missing = [Missing(**m) for m in data.get("missing") or ()]
    except TypeError as error:
        raise ResultsError(f'{path}: an entry of "missing" is not as it should be: {error}') from None
    return Results(
        entries,
        missing,
        data.get("machine") or {},
        data.get("versions") or {},
        data.get("commit_info") or {},
        data.get("datetime") or "unknown",
    )


def _entry(path: Path, benchmark: dict[str, Any]) -> Entry:
    extra, stats = benchmark.get("extra_info", {}), benchmark.get("stats", {})
    known = {f.name for f in fields(Entry)}
    try:
        entry = Entry(
            **{name: value for name, value in extra.items() if name in known},
            **{name: stats[name] for name in ("median", "iqr", "rounds")},
        )
    except (KeyError, TypeError) as error:
        raise ResultsError(f"{path}: {benchmark.get('name', 'a benchmark')} is not as it should be: {error}") from None
    if entry.kind not in ("ours", "baseline") or not entry.median > 0:
        raise ResultsError(f"{path}: {benchmark.get('name')}: kind {entry.kind!r}, median {entry.median}")
    return entry


def describe(entry: Entry, *without: str) -> str:
    """The known parameters of an entry's case, in words."""
    e = entry
    both = None not in (e.picks, e.experts) and not {"picks", "experts"} & set(without)
    parts = {
        "samples": f"{e.samples} sample{'' if e.samples == 1 else 's'}",
        "picks": f"{e.picks} of {e.experts} experts each" if both else f"{e.picks} experts each",
        "experts": None if both else f"{e.experts} experts",
        "side": f"{e.side}x{e.side} tokens",
        "width": f"width {e.width}",
        "blocks": f"{e.blocks} block{'' if e.blocks == 1 else 's'}",
        "dtype": e.dtype,
        "direction": e.direction,
        "routing": f"{e.routing} routing",
        "device": e.device,
        "threads": f"{e.threads} thread{'' if e.threads == 1 else 's'}",
    }
    return ", ".join(p for name, p in parts.items() if p and name not in without and getattr(e, name) is not None)


def si(value: float, unit: str) -> str:
    """A number with four digits and a decimal prefix."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


def size(value: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} B"
