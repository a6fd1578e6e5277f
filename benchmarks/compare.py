"""Compares two files of results by ratios: ``python -m benchmarks.compare old.json new.json``.

It compares the median of a variant divided by that of the official computation of the same case in the same file. If a
file lacks the latter, the case's first baseline in both files replaces it. A slower machine changes both medians alike.
Exit status: 0; 1 if one of our variants got slower by more than the threshold; 2 if nothing can be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .results_file import Entry, Results, ResultsError, load

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """The ratio of a variant to its reference, in both files."""

    key: Key
    ours: bool
    reference: str
    old: float
    new: float

    @property
    def factor(self) -> float:
        """Above 1 if the variant got slower."""
        return self.new / self.old

    def exceeds(self, threshold: float, symmetric: bool) -> bool:
        """``symmetric``: whether to look in both directions, so that swapping the files changes nothing."""
        limit = 1 + threshold
        return self.factor > limit or (symmetric and self.factor < 1 / limit)


def changes(old: Results, new: Results) -> list[Change]:
    """Every variant of both files except for the references, those that got slower first.

    Raises:
        ResultsError: nothing can be compared, or an entry ran on another device or with another number of threads.
    """
    before, after = _by_key(old), _by_key(new)
    common = [key for key in before if key in after]
    for key in common:
        if _where(before[key]) != _where(after[key]):
            raise ResultsError(f"{', '.join(key)}: ran on {_where(before[key])} and on {_where(after[key])}")
    found = []
    for suite, case in dict.fromkeys(key[:2] for key in common):
        keys = [key for key in common if key[:2] == (suite, case)]
        baselines = [key for key in keys if not before[key].ours]
        plain = [key for key in baselines if before[key].plain and after[key].plain]
        if not baselines:
            continue
        reference = (plain or baselines)[0]
        for key in keys:
            if key != reference:
                ratios = (entries[key].median / entries[reference].median for entries in (before, after))
                found.append(Change(key, after[key].ours, reference[2], *ratios))
    if not found:
        raise ResultsError("the files have nothing in common: no case with a baseline and another variant in both")
    return sorted(found, key=lambda change: -change.factor)


def _by_key(results: Results) -> dict[Key, Entry]:
    return {(e.suite, e.case, e.variant): e for e in results.entries}


def _where(entry: Entry) -> str:
    return f"{entry.device}, {entry.threads} threads" if entry.threads else f"{entry.device}"


def text(found: list[Change], exceeding: list[Change]) -> str:
    lines = ["  change      old      new  variant"]
    for c in found:
        mark = "  <" if c in exceeding else ""
        name = f"{', '.join(c.key)} ({'ours, ' if c.ours else ''}over {c.reference})"
        lines.append(f"{c.factor - 1:+8.1%} {c.old:8.4f} {c.new:8.4f}  {name}{mark}")
    return "\n".join(lines)


def left_out(here: Results, there: Results, name: str, found: list[Change]) -> list[str]:
    """The entries that only one file has, and those that both have without a baseline."""
    reasons = {(m.suite, m.case, m.variant): f"{m.outcome}: {m.reason}" for m in there.missing}
    others, compared = _by_key(there), {c.key[:2] for c in found}
    lines = []
    for key in _by_key(here):
        if key not in others:
            lines.append(f"only in {name}: {', '.join(key)}" + (f" ({reasons[key]})" if key in reasons else ""))
        elif key[:2] not in compared:
            lines.append(f"in both, with nothing to compare it to: {', '.join(key)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.10, help="default: %(default)s")
    parser.add_argument(
        "--symmetric", action="store_true", help="either direction of any variant: two runs, one commit"
    )
    args = parser.parse_args(arguments)
    try:
        if not args.threshold >= 0:
            raise ResultsError(f"--threshold must not be negative, got {args.threshold}")
        old, new = load(args.old), load(args.new)
        found = changes(old, new)
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    judged = [c for c in found if c.ours or args.symmetric]
    exceeding = [c for c in judged if c.exceeds(args.threshold, args.symmetric)]
    print(text(found, exceeding))
    for line in dict.fromkeys(left_out(old, new, str(args.old), found) + left_out(new, old, str(args.new), found)):
        print(line)
    what = "differ" if args.symmetric else "of ours got slower"
    print(f"{len(exceeding)} of {len(judged)} {what} by more than {args.threshold:.1%}")
    return 1 if exceeding else 0


if __name__ == "__main__":
    sys.exit(main())
