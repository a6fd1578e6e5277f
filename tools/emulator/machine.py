"""Kernels on the emulated GPU: the C++ side is built at its first use, then called with decoded instructions."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import ptx
from .decoder import Decoder
from .operands import Instruction
from .ptx import Unsupported

NATIVE = Path(__file__).with_name("native")
FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
]
FUSED = {"matrices.cpp", "tensor_memory.cpp"}  # whose products may be fused with sums
CHECKS, COUNTERS = 1, 2  # Flags of machine.h
BUILD = Path(__file__).resolve().parents[2] / "build" / "emulator"


class Fault(RuntimeError):
    """What a GPU would not forgive, or would only by chance: with the lines of the PTX and of the source."""


class Memory(NamedTuple):
    """What a kernel may access: [low, high) and, where not all of it, an array of as many bytes, 0 where it may not."""

    low: int
    high: int
    valid: np.ndarray | None = None


class Totals(NamedTuple):
    """What a launch did: warp instructions, multiply-adds of matrix units, and sectors of 32 bytes of global memory.

    The last four need ``counters=True``. Of the sectors, each counts once for the launch; and once for each block.
    """

    instructions: int
    multiplications: int
    read: int
    written: int
    read_by_blocks: int
    written_by_blocks: int


class Counter(NamedTuple):
    """Of one instruction: how often warps and lanes executed it, and what memory did for it, and at best could do."""

    line: int
    opcode: str
    executed: int
    lanes: int
    sectors: int
    ideal_sectors: int
    wavefronts: int
    ideal_wavefronts: int


class Kernel:
    """A kernel of a PTX text, ready to be launched.

    Args:
        text: the PTX.
        name: of the entry; default: the only one.

    Raises:
        Unsupported: the emulator does not know a statement.
    """

    def __init__(self, text: str, name: str | None = None) -> None:
        if name is None:
            (name,) = ptx.entries(text)
        self.text = text
        self.ptx = ptx.parse(text, name)
        decoder = Decoder(self.ptx)
        self.instructions = decoder.instructions
        library = _library()
        registers = bytearray(b"\xff" * decoder.end)
        for lanes, place in decoder.constants.items():
            registers[place : place + len(lanes)] = lanes
        number = {register: n for n, register in enumerate(sorted(_watched(self.instructions)))}
        self._module = library.emulator_module(bytes(registers), len(registers), len(number))
        for i in self.instructions:
            if library.emulator_add(self._module, *_packed(i, number)):
                raise Unsupported(f"line {i.line}: {i.opcode}: there is no {i.name}")

    def __del__(self) -> None:
        if hasattr(self, "_module"):
            _library().emulator_free(self._module)

    @property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """Name -> (offset, size) in bytes."""
        return self.ptx.parameters

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        parameters: bytes,
        memory: Sequence[Memory],
        *,
        checks: bool = True,
        counters: bool = False,
        schedule: int = 0,
    ) -> Totals:
        """Run it.

        Args:
            grid, block: up to three numbers.
            shared: bytes of dynamic shared memory.
            parameters: packed as :attr:`parameters` says.
            memory: what it may access in global memory.
            checks: look for races, missing fences and the like. Takes three times as long.
            counters: count what memory does, see :meth:`counters`.
            schedule: 0: warps in order; 1: in reverse; else the seed of a random order.

        Raises:
            Fault: see there. Of several races, all are named.
        """
        if len(parameters) != self.ptx.parameter_bytes:
            raise ValueError(f"parameters must have {self.ptx.parameter_bytes} bytes, got {len(parameters)}")
        grid, block = ([*size, 1, 1][:3] for size in (grid, block))
        regions = [x for m in memory for x in (m.low, m.high, 0 if m.valid is None else m.valid.ctypes.data)]
        totals, text = (ctypes.c_uint64 * 6)(), ctypes.create_string_buffer(20000)
        status = _library().emulator_launch(
            self._module,
            (ctypes.c_int * 3)(*grid),
            (ctypes.c_int * 3)(*block),
            self.ptx.shared_bytes + shared,
            parameters,
            len(parameters),
            (ctypes.c_uint64 * max(1, len(regions)))(*regions),
            len(memory),
            CHECKS * checks + COUNTERS * counters,
            schedule,
            totals,
            text,
            len(text),
        )
        if status:
            raise Fault(f"{self.ptx.name}: {self._with_sources(text.value.decode())}")
        return Totals(*totals)

    def counters(self) -> list[Counter]:
        """Of the last launch, per instruction."""
        found = (ctypes.c_uint64 * (6 * len(self.instructions)))()
        _library().emulator_counters(self._module, found)
        return [Counter(i.line, i.opcode, *found[6 * n : 6 * n + 6]) for n, i in enumerate(self.instructions)]

    def _with_sources(self, text: str) -> str:
        return re.sub(r"\[line (\d+)\]", lambda m: f"[PTX line {m[1]}, {self.ptx.source(int(m[1]))}]", text)


@dataclass
class Launch:
    """A launch by a driver: what was launched, and what it did."""

    name: str  # of the kernel, mangled if it is one of CUDA C++
    source: str  # Python module or file of CUDA C++ in which it is defined
    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory
    totals: Totals | None = None  # None if it was not executed
    seconds: float = 0.0

    def run(self, parameters: bytes, memory: Sequence[Memory]) -> None:
        """Execute it as SETTINGS say, and tell their observer."""
        start = time.perf_counter()
        if SETTINGS.execute:
            options = {"checks": SETTINGS.checks, "counters": SETTINGS.counters, "schedule": SETTINGS.schedule}
            self.totals = self.kernel.launch(self.grid, self.block, self.shared, parameters, memory, **options)
        self.seconds = time.perf_counter() - start
        if SETTINGS.observer is not None:
            SETTINGS.observer(self)


@dataclass
class Settings:
    """How the launches of drivers run, see :meth:`Kernel.launch`; whether at all; and who is told of each."""

    checks: bool = True
    counters: bool = False
    schedule: int = 0
    execute: bool = True
    observer: Callable[[Launch], None] | None = None


SETTINGS = Settings()


def _watched(instructions: Sequence[Instruction]) -> set[int]:
    """The registers that a wgmma uses, and those that are copied into one of them."""
    found = {register for i in instructions for register in i.uses}
    copies = [(i.reads, i.writes) for i in instructions if i.name == "mov.32"]
    before = -1
    while before != len(found):
        before = len(found)
        for sources, targets in copies:
            if not found.isdisjoint(targets):
                found |= sources
    return found


def _packed(i: Instruction, number: dict[int, int]) -> tuple:
    """The arguments of emulator_add."""
    at, imm = [*i.at, *[-1] * 8][:8], [*i.imm, *[0] * 8][:8]
    numbers = [i.kind, i.guard, i.negated, i.line, *at, *imm]
    reads, writes = ([number[r] for r in registers if r in number] for registers in (i.reads, i.writes))
    for values in (i.list, [number[r] for r in i.uses], reads, writes):
        numbers += [len(values), *values]
    return i.name.encode(), (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built()))
    c_int, c_u64, pointer = ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p
    library.emulator_module.restype = pointer
    library.emulator_module.argtypes = [ctypes.c_char_p, c_u64, c_int]
    library.emulator_free.argtypes = [pointer]
    library.emulator_add.argtypes = [pointer, ctypes.c_char_p, pointer]
    library.emulator_launch.argtypes = [
        *[pointer] * 3, c_u64, ctypes.c_char_p, c_u64, pointer, c_int, ctypes.c_uint32, ctypes.c_uint32,
        pointer, ctypes.c_char_p, c_u64,
    ]  # fmt: skip
    library.emulator_counters.argtypes = [pointer, pointer]
    return library


def _built() -> Path:
    """The library, in a cache whose names have the hash of what goes into it."""
    sources = sorted(NATIVE.glob("*.cpp"))
    compiler = os.environ.get("CXX", "g++")
    content = hashlib.sha256(" ".join([compiler, *FLAGS]).encode())
    content.update(Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].partition(b"flags")[2])
    for file in sorted(NATIVE.iterdir()):
        content.update(file.read_bytes())
    library = BUILD / f"{content.hexdigest()[:16]}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:

        def build(source: Path) -> str:
            target = Path(scratch, source.stem + ".o")
            contract = "-ffp-contract=" + ("fast" if source.name in FUSED else "off")
            run(compiler, *FLAGS, contract, "-c", str(source), "-o", str(target))
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, sources))
        run(compiler, "-shared", *objects, "-o", f"{scratch}/library.so")
        os.replace(f"{scratch}/library.so", library)
    return library


def run(*command: str) -> None:
    """Run a compiler; what it printed is in the error if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
