"""Does the emulator notice a missing synchronisation? Each is taken out of kernels that are right, one by one."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from emulator import Fault, Kernel, Memory, cuda

triton_driver = pytest.importorskip("emulator.triton_driver")

SYNCHRONISATION = re.compile(
    r"\s*(?:@!?%\w+ )?(bar\.(?:sync|arrive)|barrier\.sync|cp\.async(?:\.bulk)?\.wait_group|fence\.proxy\.async"
    r"|fence\.mbarrier_init|mbarrier\.(?:init|arrive|try_wait)|wgmma\.(?:fence|commit_group|wait_group)"
    r"|tcgen05\.(?:commit|wait::ld|wait::st))\b"
)


def without(text: str, line: int) -> str:
    """The PTX without the synchronisation in this line. A wait for copies lets one group more be on its way instead."""
    lines = text.split("\n")
    if "wait_group" in lines[line] and "wgmma" not in lines[line]:
        lines[line] = re.sub(r"(\d+);", lambda m: f"{int(m[1]) + 1};", lines[line])
    else:
        lines[line] = ""
    return "\n".join(lines)


def contents(memory: Sequence[Memory]) -> list[bytes]:
    return [ctypes.string_at(m.low, m.high - m.low) for m in memory]


def restore(memory: Sequence[Memory], values: Sequence[bytes]) -> None:
    for m, value in zip(memory, values, strict=True):
        ctypes.memmove(m.low, value, len(value))


def alone(text: str, name: str) -> str:
    """The PTX with this kernel alone. The lines of others are empty, so that numbers of lines stay."""
    lines, kept, depth, is_other = text.split("\n"), [], 0, False
    for line in lines:
        entry = re.search(r"\.entry\s+([\w$]+)", line)
        if entry and depth == 0:
            is_other = entry[1] != name
        kept.append("" if is_other else line)
        depth += line.count("{") - line.count("}")
        if depth == 0 and line.strip() == "}":
            is_other = False
    return "\n".join(kept)


def mutants_of(kernel: Kernel) -> Iterator[tuple[str, int, Kernel]]:
    """What is missing, its line, and the kernel without it."""
    text = alone(kernel.text, kernel.ptx.name)
    for number, line in enumerate(text.split("\n")):
        found = SYNCHRONISATION.match(line)
        if found:
            yield found[1], number + 1, Kernel(without(text, number), kernel.ptx.name)


Unnoticed = dict[tuple[str, int], Kernel]  # what is missing and in which line; the kernel without it


def unnoticed(call: Callable[[], object], pattern: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Unnoticed]:
    """Per kernel that ``call`` launches and whose name has the pattern: the synchronisations whose absence does not
    show."""
    found: dict[str, Unnoticed] = {}
    launch = Kernel.launch

    def launch_mutants_too(kernel, *arguments, **options):
        memory = arguments[-1]
        before = contents(memory)
        totals = launch(kernel, *arguments, **options)
        name = kernel.ptx.name
        if re.search(pattern, name) and name not in found:
            after = contents(memory)
            found[name] = {}
            for what, line, mutant in mutants_of(kernel):
                restore(memory, before)
                try:
                    launch(mutant, *arguments)
                except Fault:
                    continue
                if contents(memory) == after:
                    found[name][what, line] = mutant
            restore(memory, after)
        return totals

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "launch", launch_mutants_too)
        call()
    return found


def attention() -> object:
    from mova_kernels.ops.expert_attention import triton_impl

    length, width = 192, 64
    q, k, v, grad = (torch.randn(1, length, width).bfloat16() for _ in range(4))
    angles = torch.rand(length, width // 2).repeat_interleave(2, -1)
    tables = angles.cos(), angles.sin()
    found = triton_impl.forward(q, k, v, *tables, 1, None)
    return triton_impl.backward(grad, q, k, v, *found, *tables, 1, None)


# What Triton 3.9 emits although these kernels, at this size, do not need it: how often, per kernel, and why:
# The last wait for copies and the barrier behind it: what is still on its way is read by nobody.
# sm_90: a barrier before each copy into a buffer. There is one buffer more than are in use, so that the barrier at the
# beginning of a round orders the reads of that buffer, too. A fence before each product: what the later ones of a round
# read was copied before the first one's fence. A wgmma.fence before each: none of its registers was written since. A
# wgmma.commit_group: the next one takes its products along, and the same wait waits for both.
# sm_100: barriers in pairs, around a fence or behind a wait for copies that a later barrier follows: one is enough. A
# barrier before a wait for an mbarrier, and before a copy over what products have read: the mbarrier orders both. A
# barrier between loads from and stores to tensor memory: each warp has its own lanes. A fence before each product: as
# on sm_90. A tcgen05.wait: there is another before the next barrier or product. The barrier before tcgen05.dealloc: the
# results go through shared memory, with barriers. In _forward_kernel, a wait for copies whose tile the loop, at this
# size, does not come to, and its barrier. A wait for products: before anybody uses them, later products are waited for,
# and products are done in order.
REDUNDANT = {
    "sm_80": {
        "_forward_kernel": {"bar.sync": 1, "cp.async.wait_group": 1},
        "_grad_kv_kernel": {"bar.sync": 1, "cp.async.wait_group": 1},
        "_grad_q_kernel": {"bar.sync": 1, "cp.async.wait_group": 1},
    },
    "sm_90": {
        "_forward_kernel": {"bar.sync": 3, "cp.async.wait_group": 1, "fence.proxy.async": 1},
        "_grad_kv_kernel": {
            "bar.sync": 4,
            "cp.async.wait_group": 1,
            "fence.proxy.async": 3,
            "wgmma.commit_group": 1,
            "wgmma.fence": 1,
        },
        "_grad_q_kernel": {"bar.sync": 4, "cp.async.wait_group": 1, "fence.proxy.async": 2, "wgmma.fence": 1},
    },
    "sm_100": {
        "_forward_kernel": {
            "bar.sync": 10,
            "barrier.sync": 1,
            "cp.async.wait_group": 2,
            "fence.proxy.async": 2,
            "mbarrier.try_wait": 1,
            "tcgen05.wait::ld": 2,
            "tcgen05.wait::st": 2,
        },
        "_grad_kv_kernel": {
            "bar.sync": 8,
            "barrier.sync": 1,
            "cp.async.wait_group": 1,
            "fence.proxy.async": 9,
            "mbarrier.try_wait": 1,
            "tcgen05.wait::ld": 2,
            "tcgen05.wait::st": 1,
        },
        "_grad_q_kernel": {
            "bar.sync": 12,
            "barrier.sync": 1,
            "cp.async.wait_group": 1,
            "fence.proxy.async": 5,
            "mbarrier.try_wait": 1,
            "tcgen05.wait::st": 1,
        },
    },
}


@pytest.mark.parametrize("gpu", REDUNDANT)
def test_missing_synchronisation_of_attention(gpu, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.9."):
        pytest.skip("the counts are those of Triton 3.9")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted")
    triton_driver.use(gpu)
    try:
        found = unnoticed(attention, f"^({'|'.join(REDUNDANT[gpu])})$", monkeypatch)
    finally:
        triton_driver.leave()
    counts = {name: dict(Counter(what for what, _ in mutants)) for name, mutants in found.items()}
    assert counts == REDUNDANT[gpu], {name: list(mutants) for name, mutants in found.items()}


# ---- CUDA C++ for Hopper


def cuda_attention(width: int, pairs: int, length: int, multiprocessors: int) -> None:
    """Forward and backward, where each block works off several items."""
    from mova_kernels.ops.expert_attention import cuda_impl

    angles = torch.rand(length, width // 2).repeat_interleave(2, -1)
    tables = angles.cos(), angles.sin()
    q, k, v, grad = (torch.randn(pairs, length, width).bfloat16() for _ in range(4))
    with cuda.library("90a", multiprocessors=multiprocessors):
        found = cuda_impl.forward(q, k, v, *tables, 1, None)
        cuda_impl.backward(grad, q, k, v, *found, *tables, 1, None)


def is_serialised(kernel: Kernel, folder: Path) -> bool:
    """Whether ptxas says that it lets the matrix products wait for each other (messages C75xx)."""
    (folder / "mutant.ptx").write_text(kernel.text)
    command = [cuda.nvcc(), "-arch=sm_90a", "-cubin", "-o", str(folder / "mutant.cubin"), str(folder / "mutant.ptx")]
    run = subprocess.run(command, capture_output=True, text=True)
    return bool(re.search(r"\bC75\d\d\b", run.stdout + run.stderr))


# What does not show in the kernels for Hopper, how often, and why:
# fence.mbarrier_init: the barrier of the block behind it is enough on hardware, as Triton's code shows, but not in the
# manual of PTX. The last mbarrier.arrive of attention_forward: no item follows that would load over its values.
REDUNDANT_ON_HOPPER = {
    "attention_forward": {"fence.mbarrier_init": 1, "mbarrier.arrive": 1},
    "attention_grad_kv": {"fence.mbarrier_init": 1},
    "attention_grad_q": {"fence.mbarrier_init": 1},
}


@pytest.mark.skipif(cuda.reason() is not None, reason=str(cuda.reason()))
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", REDUNDANT_ON_HOPPER)
def test_missing_synchronisation_of_attention_in_cuda(kernel, width, monkeypatch, tmp_path) -> None:
    """Some show only where blocks go on to the next item soon, others only in long loops; ptxas tells of the rest."""
    pattern = rf"\d{kernel}I13__nv_bfloat16Li{width}E(LN\d+_GLOBAL\w+5RangeE1E|E|LNS_5RangeE1E)"
    ((name, in_short),) = unnoticed(lambda: cuda_attention(width, 6, 100, 1), pattern, monkeypatch).items()
    in_long = unnoticed(lambda: cuda_attention(width, 1, 768, 1), pattern, monkeypatch)[name]
    left = [key for key in in_short if key in in_long]
    silent = [what for what, line in left if what != "wgmma.fence" or not is_serialised(in_long[what, line], tmp_path)]
    assert dict(Counter(silent)) == REDUNDANT_ON_HOPPER[kernel], left
