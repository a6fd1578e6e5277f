"""Compile every Triton kernel for GPUs that are not there, and hold it to their limits.

    python tools/compile_gate.py [--json FILE] [--only TEXT]

A ``triton_impl.py`` takes part by having ``gate_cases()``, which yields (name, call) pairs; a call runs the launchers
on meta tensors. The launches are intercepted, so that types, constants, divisibility, warps and stages are the
launcher's own. Fails if a kernel does not compile, needs more shared memory than a block may have, or spills without
being listed in MAY_SPILL. What compiles may still be wrong: this is no test of results.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have

# (architecture, regular expression for "case kernel") -> why it may use local memory
MAY_SPILL: dict[tuple[int, str], str] = {}


class NoDevice:
    """The part of a Triton driver that a launch needs before it reaches the GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def modules() -> list[str]:
    files = sorted((ROOT / "mova_kernels" / "ops").glob("*/triton_impl.py"))
    return [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]


def compile_case(module: str, case: str, capability: int) -> list[dict[str, object]]:
    """One row of the table per kernel that the case launches."""
    rows: dict[str, dict[str, object]] = {}
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in rows:
            rows[kernel.hash] = {
                "op": module.split(".")[-2],
                "case": case,
                "kernel": self.__name__.strip("_").removesuffix("_kernel"),
                "sm": capability,
                **resources(kernel.asm["cubin"]),
                "shared": kernel.metadata.shared,
                "warps": kernel.metadata.num_warps,
                "stages": kernel.metadata.num_stages,
                "seconds": round(time.perf_counter() - start, 1),
            }
        return kernel

    triton.runtime.driver.set_active(NoDevice(capability))
    triton.JITFunction.run = compile_only
    try:
        dict(importlib.import_module(module).gate_cases())[case]()
    finally:
        triton.JITFunction.run = run
    return list(rows.values())


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "local": stack + local}


def complaint(row: dict) -> str | None:
    if row["shared"] > SHARED_LIMIT[row["sm"]]:
        return f"shared memory beyond {SHARED_LIMIT[row['sm']]}"
    allowed = any(row["sm"] == sm and re.search(p, f"{row['case']} {row['kernel']}") for sm, p in MAY_SPILL)
    return "spills" if row["local"] and not allowed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    parser.add_argument("--only", default="", help="compile only cases whose name contains this")
    arguments = parser.parse_args()
    work = [
        (module, case, sm)
        for module in modules()
        for case, _ in importlib.import_module(module).gate_cases()
        for sm in SHARED_LIMIT
        if arguments.only in case
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for found in pool.map(compile_case, *zip(*work, strict=True)) for row in found]
    columns = list(rows[0])
    widths = [max(len(c), *(len(str(row[c])) for row in rows)) for c in columns]
    for line in (dict(zip(columns, columns, strict=True)), *rows):
        verdict = complaint(line) if line["op"] != "op" else None
        print(*(str(line[c]).rjust(w) for c, w in zip(columns, widths, strict=True)), verdict or "")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return any(complaint(row) for row in rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
