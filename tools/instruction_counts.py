"""Count the instructions of the CPU kernels. Other load on the machine does not change them.

    python tools/instruction_counts.py [--accept] [--require]

Valgrind counts the instructions of the calls in tools/instruction_counts.cpp: every function of the CPU library, on one
thread, with the instruction sets that Valgrind knows. It fails if a call takes over 2 % more than in
tools/instruction_counts.json, or is gone. That file has a baseline for each compiler and processor. Without a baseline
for those of this machine, nothing is compared. ``--accept`` replaces the baseline. Fewer instructions need not be
faster: benchmarks/ measures speed, this tool notices unintended changes.

It builds in the folder that "pip install -e ." has left. Without Valgrind it only says so, or fails with ``--require``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASELINE = Path(__file__).with_suffix(".json")
BUILD = Path(os.environ.get("MOVA_BUILD_DIR", ROOT / "build" / "cmake"))
ISAS = ("avx2", "base")
KEY = ("compiler", "isa", "function", "variant", "dtype")
ALLOWED = 0.02
NO_SUCH_ISA = 2  # exit status of instruction_counts


def build() -> str:
    """Build the program whose instructions are counted. Returns the name of the compiler."""
    if not (BUILD / "CMakeCache.txt").exists():
        sys.exit(f'{BUILD} is missing: run "pip install -e ." first')
    command = ["cmake", "--build", str(BUILD), "--target", "instruction_counts"]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode:
        sys.exit(f"{built.stdout}{' '.join(command)} failed")
    info = json.loads((BUILD / "build_info.json").read_text())
    if info["build_type"] != "Release":
        sys.exit(f"{BUILD} has build type {info['build_type']}: only Release is compared")
    name, version = info["compiler"].split()
    return f"{name} {'.'.join(version.split('.')[:2])} {platform.machine()}"


def count(isa: str, compiler: str) -> list[dict] | str:
    """A row for each call, or the reason why this instruction set has none."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "counts")
        command = [
            "valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={output}",
            "--collect-atstart=no", "--toggle-collect=counted", "--dump-after=counted",
            str(BUILD / "instruction_counts"), isa,
        ]  # fmt: skip
        # A fixed environment: its size moves the stack, and the path that memcpy takes depends on addresses.
        ran = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
        if ran.returncode == NO_SUCH_ISA:
            return ran.stderr.strip()
        if ran.returncode:
            sys.exit(f"{ran.stderr}{' '.join(command)} failed")
        calls = [line.split() for line in ran.stdout.splitlines()]
        parts = [Path(f"{output}.{i}") for i in range(1, len(calls) + 1)]
        return [
            {**dict(zip(KEY, (compiler, isa, *call), strict=True)), "instructions": total(part.read_text())}
            for call, part in zip(calls, parts, strict=True)
        ]


def total(part: str) -> int:
    found = re.search(r"^totals: (\d+)$", part, re.MULTILINE)
    assert found, part
    return int(found[1])


def label(row: dict) -> tuple[str, ...]:
    return tuple(row[k] for k in KEY)


def compare(before: list[dict], after: list[dict]) -> tuple[list[list[str]], list[list[str]]]:
    """The rows of :func:`table` for calls that got worse or are gone, and for those that improved or are new."""
    old, new = ({label(row): row["instructions"] for row in rows} for rows in (before, after))
    worse, better = [], []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        line = [*name[1:], *("-" if n is None else str(n) for n in (was, now))]
        if was is None:
            better.append([*line, "new"])
        elif now is None:
            worse.append([*line, "gone"])
        elif abs(now - was) > ALLOWED * was:
            (worse if now > was else better).append([*line, f"{now / was - 1:+.1%}"])
    return worse, better


def table(lines: list[list[str]]) -> str:
    lines = [["isa", "function", "variant", "dtype", "before", "after", "change"], *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align: list[Callable[[str, int], str]] = [*[str.ljust] * 4, *[str.rjust] * 3]
    return "\n".join(" ".join(a(c, w) for a, c, w in zip(align, line, widths, strict=True)).rstrip() for line in lines)


def main(options: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help=f"write what was found to {BASELINE.name}")
    parser.add_argument("--require", action="store_true", help="fail without Valgrind")
    arguments = parser.parse_args(options)
    if shutil.which("valgrind") is None:
        print("instruction counts: skipped: valgrind is not installed")
        return arguments.require
    compiler = build()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda isa: count(isa, compiler), ISAS))
    for isa, found in zip(ISAS, results, strict=True):
        if isinstance(found, str):
            print(f"instruction counts: {isa} skipped: {found}")
    rows = [row for found in results if not isinstance(found, str) for row in found]
    counted = {row["isa"] for row in rows}

    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else []
    before = [row for row in baseline if row["compiler"] == compiler and row["isa"] in counted]
    if arguments.accept:
        kept = [row for row in baseline if row not in before]
        BASELINE.write_text("[\n" + ",\n".join(map(json.dumps, sorted(kept + rows, key=label))) + "\n]\n")
    if not before:
        print(f"instruction counts: nothing compared, since {BASELINE.name} had no baseline for {compiler}")
        return 0
    worse, better = compare(before, rows)
    if better:
        print(f"instruction counts: improved or new: accept it\n{table(better)}")
    if worse:
        print(f"instruction counts: worse\n{table(worse)}")
    if worse and not arguments.accept:
        print("where this is meant: python tools/instruction_counts.py --accept")
        return 1
    print(f"instruction counts: {len(rows)} compared with those of {compiler}, {len(worse)} of them worse")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
