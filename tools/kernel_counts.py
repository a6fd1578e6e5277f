"""Count the work of every GPU kernel at official sizes on the emulator (tools/emulator), independent of load.

    python tools/kernel_counts.py [--gpu sm_90] [--accept]

It runs one block of the released adapter and the part after the blocks in bf16, forward and backward, with the kernels
as they are compiled for each architecture: those of Triton, and on sm_90a those of CUDA C++ for Hopper. It fails if a
kernel has more than 1 % more of a quantity than in tools/kernel_counts.json, or is gone. That file has a baseline for
each version of Triton. Without one for the version that runs, the differences to the newest are printed. ``--accept``
also counts more samples and experts, from which tools/predicted_times.py extrapolates (fifteen minutes), and writes all
figures into that file. ``--accept --quick`` leaves the rows of more samples and experts as they are.

A row is one launch, or several equal ones:

    instructions   of warps, as PTX has them. Not all become instructions of a GPU: ptxas removes most moves
    matrix, special, float, move, ...   of these, by kind, see KINDS
    macs           multiply-adds of matrix instructions
    sectors        of 32 bytes that the requests to global memory touch; and the least, if each were contiguous
    wavefronts     of shared memory, operands of matrix products included; and the least, without bank conflicts
    read, written  bytes of global memory; the sums of the blocks count a byte once for each block that needs it
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton
from emulated_gpu import GPUS, emulated_gpu
from emulator import SETTINGS, Launch
from emulator import cuda as emulated_cuda

ROOT = Path(__file__).resolve().parents[1]
BASELINE = Path(__file__).with_suffix(".json")
VERSION = ".".join(triton.__version__.split(".")[:2])
ALLOWED = 0.01
PICKED = (0, 1, 4)  # DINOv2, Vary and Deplot; each sample selects the first ones of these
PROBLEMS = [(1, 1), (1, 3), (2, 3)]  # samples and experts of each; CI counts the first

# The kinds of instructions and their opcodes. An opcode belongs to the first kind that matches.
KINDS = {
    "matrix": r"mma|wgmma\.mma|tcgen05\.mma",
    "special": r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\b",
    "synchronisation": r"bar|mbarrier|fence|membar|wgmma|tcgen05\.(commit|wait|fence)|cp\.async\.(commit|wait)|elect",
    "memory": r"ld|st|cp\.|atom|red\.|tcgen05",
    "shuffle": r"shfl|redux|vote|match|activemask",
    "move": r"mov|cvta",
    "control": r"bra|brx|ret|exit|setp|selp|trap",
    "convert": r"cvt",
    "float": r".*\.(f|bf)(16|32|64)",
    "integer": r"",
}
KEY = ("triton", "sm", "samples", "experts", "direction", "kernel")


def kind_of(opcode: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, opcode))


def counted(launch: Launch) -> dict:
    """The figures of a launch."""
    totals, kinds, memory = launch.totals, Counter(dict.fromkeys(KINDS, 0)), Counter()
    assert totals is not None
    for c in launch.kernel.counters():
        kinds[kind_of(c.opcode)] += c.executed
        memory.update(c._asdict() | {"opcode": 0})
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    return {
        "blocks": blocks,
        "warps": -(-launch.block[0] * launch.block[1] * launch.block[2] // 32),
        "instructions": totals.instructions,
        **kinds,
        "macs": totals.multiplications,
        **{n: memory[n] for n in ("sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts")},
        **{n: 32 * getattr(totals, n) for n in ("read", "written", "read_by_blocks", "written_by_blocks")},
    }


@contextmanager
def observed() -> Iterator[list[tuple[str, Launch, dict | None]]]:
    """Collects (op and kernel, launch, figures if it was executed) of all launches. They run without checks."""
    found: list[tuple[str, Launch, dict | None]] = []

    def note(launch: Launch) -> None:
        found.append((name_of(launch), launch, counted(launch) if launch.totals else None))

    with mock.patch.multiple(SETTINGS, checks=False, counters=True, observer=note):
        yield found


def name_of(launch: Launch) -> str:
    """ "expert_attention/forward"; of CUDA C++: "expert_attention.cu/attention_forward"."""
    if launch.source.endswith(".cu"):
        readable = subprocess.run(["c++filt", launch.name], capture_output=True, text=True, check=True).stdout
        found = re.search(r"(\w+)(?:<.*>)?\(.*\)$", readable.strip())
        assert found is not None, readable
        return f"{Path(launch.source).parent.name}.cu/{found[1]}"
    return f"{launch.source.split('.')[-2]}/{launch.name.strip('_').removesuffix('_kernel')}"


def adapter_step(samples: int, experts: int, blocks: int = 1) -> dict[str, Callable[[], None]]:
    """The forward and backward pass of the released adapter with this number of blocks, as calls in this order."""
    from dataclasses import replace

    from benchmarks.cases import GRIDS, OFFICIAL
    from mova_kernels import MoVAdapter

    torch.manual_seed(0)
    config = replace(OFFICIAL, num_layers=blocks)
    adapter = MoVAdapter(config).bfloat16()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16()

    base = random(samples, config.resolution**2, config.in_channels).requires_grad_()
    features = [random(samples, side**2, c) for side, c in zip(GRIDS, config.expert_channels, strict=True)]
    routing = torch.zeros(samples, len(features), dtype=torch.bool)
    routing[:, PICKED[:experts]] = True
    text, output = random(samples, config.text_channels), []
    return {
        "forward": lambda: output.append(adapter(base, features, routing, text)),
        "backward": lambda: output[0].backward(torch.ones_like(output[0])),
    }


def adapter_rows(gpu: str, samples: int, experts: int) -> list[dict]:
    rows: list[dict] = []
    with emulated_gpu(gpu), observed() as launches:
        for direction, call in adapter_step(samples, experts).items():
            launches.clear()
            call()
            add_rows(rows, (VERSION, gpu, samples, experts, direction), launches)
    return rows


def other_rows(gpu: str) -> list[dict]:
    """The rows of kernels that :func:`adapter_rows` does not launch, for one sample and all experts.

    These are rope2d, the CUDA kernels, and the gradient of feature_norm, whose features are frozen in the adapter.
    """
    from benchmarks.cases import GRIDS, OFFICIAL
    from mova_kernels.ops import feature_norm, rope2d, rope2d_table
    from mova_kernels.ops.feature_resample import cuda_impl

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).bfloat16().requires_grad_()

    rows: list[dict] = []
    size = (OFFICIAL.resolution, OFFICIAL.resolution)
    grids = [(side, side) for side in GRIDS]
    features = [random(1, h * w, c) for (h, w), c in zip(grids, OFFICIAL.expert_channels, strict=True)]
    with emulated_gpu(gpu), observed() as launches:
        base = random(1, size[0] * size[1], OFFICIAL.num_heads, OFFICIAL.head_channels)
        turned = rope2d(base, *rope2d_table(OFFICIAL.resolution, OFFICIAL.head_channels))
        normalised = feature_norm(features, grids, size, [None] * len(features))
        add_rows(rows, (VERSION, gpu, 1, len(GRIDS), "forward"), launches)
        launches.clear()
        torch.autograd.backward([turned, *normalised], [torch.ones_like(x) for x in (turned, *normalised)])
        add_rows(rows, (VERSION, gpu, 1, len(GRIDS), "backward"), launches)
    if emulated_cuda.reason() is not None:
        print(f"the CUDA kernels are left out: {emulated_cuda.reason()}")
        return rows
    with emulated_cuda.library({"sm_90": "90a"}.get(gpu, gpu.removeprefix("sm_"))), observed() as launches:
        resampled = [cuda_impl.forward(f.detach(), None, grid, size) for f, grid in zip(features, grids, strict=True)]
        add_rows(rows, (VERSION, gpu, 1, len(GRIDS), "forward"), launches)
        launches.clear()
        for grad, grid in zip(resampled, grids, strict=True):
            cuda_impl.backward(grad, grid, size)
        add_rows(rows, (VERSION, gpu, 1, len(GRIDS), "backward"), launches)
    return rows


def add_rows(rows: list[dict], key: tuple, launches: list[tuple[str, Launch, dict | None]]) -> None:
    """Add a row for each launch. Equal launches of a kernel share a row; different ones are numbered."""
    of_kernel: dict[str, list[dict]] = {}
    for name, _, figures in launches:
        assert figures is not None
        same = of_kernel.setdefault(name, [])
        for row in same:
            if figures.items() <= row.items():
                row["launches"] += 1
                break
        else:
            numbered = name if not same else f"{name}#{len(same) + 1}"
            same.append({**dict(zip(KEY, (*key, numbered), strict=True)), "launches": 1, **figures})
            rows.append(same[-1])


def count(gpu: str, samples: int, experts: int) -> list[dict]:
    others = gpu != "sm_90a" and (samples, experts) == PROBLEMS[0]  # there they are those of sm_90
    return adapter_rows(gpu, samples, experts) + (other_rows(gpu) if others else [])


def label(row: dict) -> tuple:
    return tuple(row[k] for k in KEY)


def changes(before: list[dict], after: list[dict]) -> tuple[list[str], list[str]]:
    """The kernels that got worse, and those that differ otherwise, one line for each."""
    old, new = ({label(row)[1:]: row for row in rows} for rows in (before, after))
    worse, others = [], []
    for name in sorted(old.keys() | new.keys()):
        text = "{} B={} K={} {} {}".format(*name)
        if name not in new:
            worse.append(f"{text}: gone")
        elif name not in old:
            others.append(f"{text}: new")
        else:
            was, now = old[name], new[name]
            figures = [f for f in was if f not in KEY and was[f] != now[f]]
            line = f"{text}: {', '.join(f'{f} {was[f]} -> {now[f]}' for f in figures)}"
            more = any(now[f] > was[f] * (1 + ALLOWED) for f in figures if not f.startswith("ideal"))
            (worse if more else others).extend([line] * bool(figures))
    return worse, others


def table(rows: list[dict]) -> str:
    """The most important figures as a table."""
    lines = [["kernel", "launches", "instr.", "GMAC", "special", "wavefronts", "of ideal", "sectors", "of ideal", "MB"]]
    for row in rows:
        lines.append([
            f"{row['sm']} {row['samples']}x{row['experts']} {row['direction']} {row['kernel']}",
            str(row["launches"]), f"{row['instructions'] / 1e6:.2f}M", f"{row['macs'] / 1e9:.2f}",
            f"{row['special'] / 1e6:.2f}M", f"{row['wavefronts'] / 1e6:.2f}M",
            f"{row['wavefronts'] / max(1, row['ideal_wavefronts']):.2f}", f"{row['sectors'] / 1e6:.2f}M",
            f"{row['sectors'] / max(1, row['ideal_sectors']):.2f}", f"{(row['read'] + row['written']) / 1e6:.1f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(" ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, help="only this architecture")
    parser.add_argument("--accept", action="store_true", help=f"write what was found to {BASELINE.name}")
    parser.add_argument("--quick", action="store_true", help="with --accept: only what CI compares")
    arguments = parser.parse_args()
    gpus = [arguments.gpu] if arguments.gpu else list(GPUS)
    every = arguments.accept and not arguments.quick
    work = [(gpu, *problem) for problem in (PROBLEMS if every else PROBLEMS[:1]) for gpu in gpus]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for found in pool.map(count, *zip(*work, strict=True)) for row in found]
    print(table(rows), "", sep="\n")

    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else []
    known = {row["triton"] for row in baseline}
    newest = max(known, key=lambda v: [int(n) for n in v.split(".")], default=VERSION)
    compared = VERSION if VERSION in known else newest
    recounted = {label(row)[1:4] for row in rows}
    before = [row for row in baseline if row["triton"] == compared and label(row)[1:4] in recounted]
    worse, others = changes(before, rows)
    print(f"worse than in {BASELINE.name}, triton {compared}:", *worse or ["nothing"], sep="\n  ")
    print("changed otherwise:", *others or ["nothing"], sep="\n  ")
    if arguments.accept:
        kept = [row for row in baseline if row["triton"] != VERSION or label(row)[1:4] not in recounted]
        BASELINE.write_text("[\n" + ",\n".join(map(json.dumps, kept + rows)) + "\n]\n")
        return 0
    if worse and compared == VERSION:
        print("where that is meant: python tools/kernel_counts.py --accept")
        return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
