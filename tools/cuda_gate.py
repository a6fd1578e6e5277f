"""Compile the CUDA kernels for sm_90a, and check what the compiler made of them.

    python tools/cuda_gate.py [--accept]

It fails if ptxas spills, uses a stack or says that it serialises products (messages C75xx), if a kernel has a register
beyond those that setmaxnreg leaves to its consumers, or if a power of 2 in the inner loop does not run beside a matrix
product. tools/cuda_gate.json has the earlier figures, by the version of nvcc. All differences are printed. If the file
has the version that runs, it fails if the inner loop has over 1 % more instructions or another number of products.
``--accept`` replaces the figures of the version that runs.

Columns: ``registers``: the highest in the code, plus one; ``granted``: by setmaxnreg; ``loop``: instructions in the
inner loop, which is the shortest one with products (waits inside it do not count); ``products`` and ``powers``: the
wgmma and the powers of 2 among them; ``copies``: the instructions of the whole kernel that load through TMA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from emulator.cuda import ROOT, nvcc
from sass import INSTRUCTION, loops

BASELINE = Path(__file__).with_suffix(".json")
ALLOWED = 0.01  # more instructions in the loop
KEY, FIGURES = ("nvcc", "file", "kernel"), ("registers", "granted", "loop", "products", "powers", "copies")
VERSION = re.search(r"release ([\d.]+)", subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout)[
    1
]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_file(source: Path) -> tuple[list[dict], list[str]]:
    """The rows of the kernels in a file, and the complaints."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        target = "-gencode=arch=compute_90a,code=sm_90a"
        command = [nvcc(), "-std=c++17", "-O3", "-DNDEBUG", "-DMK_HAS_SM90A", f"-I{ROOT / 'csrc'}", target]
        command += ["-Xptxas=-v", "-cubin", "-o", str(cubin), str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        messages = run.stdout + run.stderr
        sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    name = str(source.relative_to(ROOT))
    complaints = [f"{name}: {line.strip()}" for line in messages.split("\n") if complaint(line)]
    rows = []
    for part in re.split(r"\n\s+Function : ", sass)[1:]:
        mangled, _, code = part.partition("\n")
        row, covered = row_of(code)
        rows.append({"nvcc": VERSION, "file": name, "kernel": demangled(mangled.strip()), **row})
        label = f"{name}: {rows[-1]['kernel']}"
        if row["registers"] > row["granted"]:
            complaints.append(f"{label}: {row['registers']} registers, setmaxnreg leaves {row['granted']}")
        if covered < row["powers"]:
            complaints.append(f"{label}: {covered} of {row['powers']} powers of 2 run beside a product")
    return rows, complaints


def complaint(line: str) -> bool:
    """Whether a line of ptxas tells of spills, of a stack, or of products that wait for each other."""
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
    return bool(re.search(r"\bC75\d\d\b", line) or (numbers and any(map(int, numbers.groups()))))


def row_of(sass: str) -> tuple[dict, int]:
    """The figures of a kernel, and how many powers of 2 of the inner loop are between the issue of a product and the
    last wait for it."""
    code = INSTRUCTION.findall(sass)
    with_products = [loop for loop in loops(sass) if any(name.startswith("HGMMA") for _, _, name, _ in loop)]
    loop = min(with_products, key=len, default=[])
    registers = {int(n) for _, _, _, operands in code for n in re.findall(r"\bR(\d+)\b", operands)}
    granted = [
        int(n, 16) for _, _, name, operands in code if "SETMAXREG" in name for n in re.findall("0x(\\w+)", operands)
    ]
    names = [name for _, _, name, _ in loop]
    waits = [i for i, name in enumerate(names) if "DEPBAR" in name]
    powers = [i for i, name in enumerate(names) if name.startswith("MUFU.EX2")]
    figures = {
        "registers": max(registers, default=-1) + 1,
        "granted": max(granted, default=255),
        "loop": len(loop),
        "products": sum(name.startswith("HGMMA") for name in names),
        "powers": len(powers),
        "copies": sum(name.startswith("UTMALDG") for _, _, name, _ in code),
    }
    return figures, sum(waits[0] < i < waits[-1] for i in powers) if waits else 0


def demangled(name: str) -> str:
    full = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    return re.sub(r"\(anonymous namespace\)::|^void ", "", full).partition("(CUtensorMap")[0].strip()


def label(row: dict) -> tuple:
    return row["file"], row["kernel"]


def changes(before: list[dict], after: list[dict]) -> tuple[list[str], list[str]]:
    """The kernels that got worse, and those that differ otherwise, one line for each."""
    old, new = ({label(row): row for row in rows} for rows in (before, after))
    worse = [f"{' '.join(name)}: gone" for name in old.keys() - new.keys()]
    others = [f"{' '.join(name)}: new" for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        was, now = old[name], new[name]
        found = [f"{figure} {was[figure]} -> {now[figure]}" for figure in FIGURES if was[figure] != now[figure]]
        more = now["loop"] > was["loop"] * (1 + ALLOWED) or now["products"] != was["products"]
        (worse if more else others).extend([f"{' '.join(name)}: {', '.join(found)}"] * bool(found))
    return sorted(worse), sorted(others)


def table(rows: list[dict]) -> list[str]:
    columns = [*KEY[1:], *FIGURES]
    lines = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [" ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help=f"write what was found to {BASELINE.name}")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(compile_file, sorted(ROOT.glob("csrc/*/*_sm90a.cu"))))
    rows = [row for of_file, _ in found for row in of_file]
    complaints = [text for _, of_file in found for text in of_file]
    print(*table(rows), "", sep="\n")
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else []
    same = [row for row in baseline if row["nvcc"] == VERSION]
    worse, others = changes(same, rows) if same else ([], [])
    print(f"worse than in {BASELINE.name}, nvcc {VERSION}:", *worse or ["nothing"], sep="\n  ")
    print("changed otherwise:", *others or ["nothing"], sep="\n  ")
    print(*["violations:", *complaints] if complaints else ["no violations"], sep="\n  ")
    if arguments.accept:
        rows += [row for row in baseline if row["nvcc"] != VERSION]
        BASELINE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        return bool(complaints)
    return bool(complaints or worse)


if __name__ == "__main__":
    sys.exit(main())
