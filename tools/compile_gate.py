"""Compile every Triton kernel for GPUs that this machine lacks, and check it against their limits.

    python tools/compile_gate.py [--only TEXT] [--accept]

Every ``triton_impl.py`` has a function ``compile_cases()``, which yields (name, call) pairs. A call runs launchers on
meta tensors. Their launches are intercepted, so types, constants, divisibility, warps and stages are the launcher's
own. This does not test results: a kernel that compiles may still be wrong.

It fails if a kernel does not compile, needs more shared memory than a block may have, spills to local memory, has no
matrix instruction for its tl.dot (on sm_90: no wgmma), has one where tl.dot requests real fp32 ("ieee"), has no fence
between writes of threads to shared memory and wgmma or tcgen05 that read it, or may fuse products where ROUNDED forbids
it.

tools/compile_gate.json has the earlier figures of the kernels, by Triton's major and minor version. All differences are
printed. If the file has the version that runs, a kernel that got worse fails: more than 8 registers more, more than 5 %
more local or shared memory or instructions in the inner loop, another matrix instruction, or a kernel that is gone.
``--accept`` replaces the figures of the version that runs.

Columns: ``local`` in bytes per thread, stack included; ``loop``: instructions in the inner loop (tools/sass.py says how
they are counted), 0 if there is none; ``matrix``: the matrix instruction in the PTX, "fma" for a tl.dot without one, or
"-" for a kernel without tl.dot.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from sass import loop_instructions
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[1]
BASELINE = Path(__file__).with_suffix(".json")
VERSION = ".".join(triton.__version__.split(".")[:2])
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have
LOCAL_LIMIT = {80: 0, 90: 0, 100: 64}  # bytes of a thread; on sm_100 some Triton always spills a register or two
DEVICES = {
    80: "NVIDIA-A100-SXM4-80GB",
    90: "NVIDIA-H200",
    100: "NVIDIA-B200",
}  # their configurations are compiled
MATRIX = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
MORE_REGISTERS, MORE_OF_OTHERS = 8, 0.05  # than in the baseline: a kernel with less is not worse
# "op case kernel" of kernels that subtract values which must be equal to the bit, so their products must be rounded.
ROUNDED = r"^swiglu_norm |^expert_attention .* wide_"
KEY, FIGURES = ("triton", "op", "case", "kernel", "sm"), ("registers", "local", "shared", "matrix", "loop")

# (regular expression for "op case kernel sm_90", complaint) -> why it is accepted
ALLOWED: dict[tuple[str, str], str] = {}


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


def op_of(module: str) -> str:
    return module.split(".")[-2]


def compile_case(module: str, case: str, capability: int) -> tuple[list[dict], float, str | None]:
    """The rows of all kernels that the case launches, the seconds that it took, and the complaints."""
    rows: dict[str, dict] = {}
    run, op, start, error = triton.JITFunction.run, op_of(module), time.perf_counter(), None

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in rows:
            name = self.__name__.strip("_").removesuffix("_kernel")
            times = sum(row["kernel"].split("#")[0] == name for row in rows.values()) + 1
            rows[kernel.hash] = {
                "triton": VERSION,
                "op": op,
                "case": case,
                "kernel": name if times == 1 else f"{name}#{times}",
                "sm": capability,
                **resources(kernel.asm["cubin"]),
                "shared": kernel.metadata.shared,
                "loop": inner_loop(kernel.asm["ttir"], kernel.asm["cubin"]),
                **matrix(kernel.asm["ttir"], kernel.asm["ptx"]),
                "fused": kernel.metadata.enable_fp_fusion,
                "fenced": fenced(kernel.asm["ptx"]),
                "warps": kernel.metadata.num_warps,
                "stages": kernel.metadata.num_stages,
            }
        return kernel

    importlib.import_module("mova_kernels._triton.tuning").device_name = lambda device: DEVICES[capability]
    triton.runtime.driver.set_active(NoDevice(capability))
    torch.backends.cuda.matmul.allow_tf32 = False  # the case before may have set it
    triton.JITFunction.run = compile_only
    try:
        dict(importlib.import_module(module).compile_cases())[case]()
    except Exception as failure:  # the others are to be seen, too
        error = f"{op} {case} sm_{capability}: {type(failure).__name__}: {failure}"
    finally:
        triton.JITFunction.run = run
    return list(rows.values()), time.perf_counter() - start, error


def resources(cubin: bytes) -> dict:
    usage = cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "local": stack + local}


def cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def inner_loop(ttir: str, cubin: bytes) -> int:
    has_loop = "scf.for" in ttir or "scf.while" in ttir  # else disassembling it would cost a quarter of a second
    return loop_instructions(cuobjdump("-sass", cubin)) if has_loop else 0


def matrix(ttir: str, ptx: str) -> dict:
    """The matrix instruction, and the one that the tl.dots request: "fma" if all are real fp32, else "matrix"."""
    dots = re.findall(r"tt\.dot(?:_scaled)? .*", ttir)
    fp32 = [re.search(r": tensor<\S*xf32>", d) and not re.search(r"inputPrecision = (?!ieee)", d) for d in dots]
    found = "+".join(name for name, pattern in MATRIX.items() if re.search(pattern, ptx))
    return {"matrix": found or ("fma" if dots else "-"), "asked": "-" if not dots else "fma" if all(fp32) else "matrix"}


def fenced(ptx: str) -> bool:
    """Whether wgmma and tcgen05 see the writes of threads. Triton 3.6 has no fence after asynchronous copies."""
    if not re.search(f"{MATRIX['wgmma']}|{MATRIX['tcgen05']}", ptx):
        return True
    unfenced_copies = VERSION == "3.6" and re.search(r"\bcp\.async\.c[ag]\.", ptx)
    return "fence.proxy.async" in ptx and not unfenced_copies


def complaint(row: dict) -> str | None:
    if row["shared"] > SHARED_LIMIT[row["sm"]]:
        found = "too much shared memory"
    elif row["local"] > LOCAL_LIMIT[row["sm"]]:
        found = "spills"
    elif row["asked"] == "matrix" and row["sm"] == 90 and "wgmma" not in row["matrix"]:
        found = "no wgmma"
    elif row["asked"] == "matrix" and row["matrix"] == "fma":
        found = "no matrix instruction"
    elif row["asked"] == "fma" and row["matrix"] != "fma":
        found = "not fp32"
    elif not row["fenced"]:
        found = "no fence"
    elif row["fused"] and re.search(ROUNDED, label(row)):
        found = "fuses products"
    else:
        return None
    return None if any(re.search(p, label(row)) and found == c for p, c in ALLOWED) else found


def label(row: dict) -> str:
    return f"{row['op']} {row['case']} {row['kernel']} sm_{row['sm']}"


def table(rows: list[dict]) -> list[str]:
    columns = [c for c in (rows or [{}])[0] if c not in ("triton", "asked", "fused", "fenced")]
    lines = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    verdicts = ["", *(complaint(row) or "" for row in rows)]
    return [
        " ".join([*(cell.rjust(w) for cell, w in zip(line, widths, strict=True)), verdict]).rstrip()
        for line, verdict in zip(lines, verdicts, strict=True)
    ]


def changes(before: list[dict], after: list[dict]) -> tuple[list[str], list[str]]:
    """The kernels that got worse, and those that differ otherwise, one line for each."""
    old, new = ({label(row): row for row in rows} for rows in (before, after))
    worse = [f"{name}: gone" for name in old.keys() - new.keys()]
    others = [f"{name}: new" for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        was, now = old[name], new[name]
        found = [f"{figure} {was[figure]} -> {now[figure]}" for figure in FIGURES if was[figure] != now[figure]]
        (worse if is_worse(was, now) else others).extend([f"{name}: {', '.join(found)}"] * bool(found))
    return sorted(worse), sorted(others)


def is_worse(was: dict, now: dict) -> bool:
    return (
        now["registers"] > was["registers"] + MORE_REGISTERS
        or any(now[figure] > was[figure] * (1 + MORE_OF_OTHERS) for figure in ("local", "shared", "loop"))
        or now["matrix"] != was["matrix"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only cases of which 'op case' contains this")
    parser.add_argument("--accept", action="store_true", help=f"write what was found to {BASELINE.name}")
    arguments = parser.parse_args()
    work = [
        (module, case, sm)
        for module in modules()
        for case, _ in importlib.import_module(module).compile_cases()
        for sm in SHARED_LIMIT
        if arguments.only in f"{op_of(module)} {case}"
    ]
    if not work:
        parser.error(f"no case contains {arguments.only!r}")
    start = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_case, *zip(*work, strict=True)))
    rows = [row for found, _, _ in results for row in found]
    errors = [error for _, _, error in results if error]
    errors += [f"{label(row)}: {complaint(row)}" for row in rows if complaint(row)]
    print(*table(rows), "", sep="\n")
    for op in dict.fromkeys(op_of(module) for module, _, _ in work):
        seconds = sum(s for (module, _, _), (_, s, _) in zip(work, results, strict=True) if op_of(module) == op)
        print(f"{op}: {sum(row['op'] == op for row in rows)} kernels, {seconds:.0f} s of compilation")
    print(f"triton {triton.__version__}: {time.perf_counter() - start:.0f} s\n")

    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else []
    known = {row["triton"] for row in baseline}
    compared = (
        VERSION if VERSION in known else max(known, key=lambda v: [int(n) for n in v.split(".")], default=VERSION)
    )
    selected = [row for row in baseline if arguments.only in f"{row['op']} {row['case']}"]
    worse, others = changes([row for row in selected if row["triton"] == compared], rows)
    print(f"worse than in {BASELINE.name}, triton {compared}:", *worse or ["nothing"], sep="\n  ")
    print("changed otherwise:", *others or ["nothing"], sep="\n  ")
    if arguments.accept:
        kept = [row for row in baseline if row["triton"] != VERSION or row not in selected]
        kept += [{k: row[k] for k in KEY + FIGURES} for row in rows]
        kept.sort(key=lambda row: [row[k] for k in KEY])
        BASELINE.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    print(*["violations:", *errors] if errors else ["no violations"], sep="\n  ")
    refused = bool(worse) and compared == VERSION and not arguments.accept
    if refused:
        only = f" --only {shlex.quote(arguments.only)}" if arguments.only else ""
        print(f"{len(worse)} worse; where that is meant, with this Triton: python tools/compile_gate.py{only} --accept")
    return bool(errors) or refused


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
