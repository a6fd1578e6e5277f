"""Small PTX kernels for the tests of tools/emulator: a test writes the few lines that it is about, the rest is here."""

from __future__ import annotations

import functools
import math
import random
import re
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from emulator import Fault, Kernel
from emulator.memory import memory_of

TESTED: set[tuple[str, int | None]] = (
    set()
)  # opcodes that some test is about, with the number of operands if it matters
EXECUTED: set[str] = set()  # opcodes that kernels of the current test have executed


def about(*opcodes: str) -> Callable:
    """Say which opcodes a test is about. The test fails if it does not execute them all."""
    TESTED.update((opcode, None) for opcode in opcodes)

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def checked(*args, **kwargs) -> None:
            EXECUTED.clear()
            test(*args, **kwargs)
            assert not set(opcodes) - EXECUTED, "the test does not execute all the opcodes that it is about"

        return checked

    return decorate


# ---- kernels
def kernel_text(body: str, arrays: int = 0, row_bytes: Sequence[int] = (), shared: int = 0) -> str:
    """A kernel around ``body``, which may use these registers.

    ``%p0``, ``%p1``, ... point to the arrays, and ``%e0``, ... to the row of each array that belongs to this thread.
    ``%i`` is the number of the thread in the grid, ``%t`` in its block, ``%l`` in its warp; ``%w`` the number of the
    warp in its block; ``%s`` the address of shared memory. ``%c``, ``%h``, ``%r``, ``%d`` and ``%q`` with a number are
    free registers of 8, 16, 32 and 64 bits, and predicates.
    """
    parameters = ", ".join(f".param .u64 array{k}" for k in range(arrays))
    pointers = [
        f"ld.param.u64 %p{k}, [array{k}]; mad.wide.u32 %e{k}, %i, {row_bytes[k]}, %p{k};" for k in range(arrays)
    ]
    memory = f".shared .align 1024 .b8 shared_memory[{shared}];" if shared else ""
    return f"""
.version 8.7
.target sm_100a
.address_size 64
.visible .entry test({parameters})
{{
.reg .b8 %c<9>; .reg .b16 %h<99>; .reg .b32 %r<999>; .reg .b64 %d<99>; .reg .pred %q<99>;
.reg .b32 %i, %t, %l, %w, %s; .reg .b64 %p<9>, %e<9>;
{memory}
mov.u32 %t, %tid.x; mov.u32 %l, %laneid; shr.u32 %w, %t, 5;
mov.u32 %i, %ctaid.x; mad.lo.u32 %i, %i, %ntid.x, %t;
{"mov.u32 %s, shared_memory;" if shared else ""}
{" ".join(pointers)}
{body}
ret;
}}
"""


def run(
    body: str, *arrays: np.ndarray, threads: int = 32, blocks: int = 1, shared: int = 0, schedule: int = 0, **options
) -> str:
    """Run a kernel with this body on the arrays, which it changes in place; returns its text."""
    text = kernel_text(body, len(arrays), [array.strides[0] if array.ndim else 0 for array in arrays], shared)
    kernel = Kernel(text)
    pointers = np.array([array.ctypes.data for array in arrays], np.uint64)
    memory = memory_of([torch.from_numpy(array) for array in arrays])
    kernel.launch([blocks], [threads], 0, pointers.tobytes(), memory, schedule=schedule, **options)
    EXECUTED.update(statement.opcode for statement in kernel.ptx.statements)
    return text


def aligned(shape: int | tuple[int, ...], dtype: type, boundary: int = 128) -> np.ndarray:
    """Zeros at an address that is a multiple of ``boundary``."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    space = np.zeros(size + boundary, np.uint8)
    start = -space.ctypes.data % boundary
    return space[start : start + size].view(dtype).reshape(shape)


def swizzled(rows: np.ndarray, swizzle: int) -> np.ndarray:
    """Rows of ``swizzle`` bytes as they lie in shared memory: in each, the pieces of 16 bytes are permuted."""
    pieces = rows.reshape(len(rows), -1, 16)
    placed = np.empty_like(pieces)
    for r in range(len(rows)):
        for c in range(pieces.shape[1]):
            placed[r, c ^ {0: 0, 32: r // 4 % 2, 64: r // 2 % 4, 128: r % 8}[swizzle]] = pieces[r, c]
    return placed.reshape(rows.shape)


def tensor_map(tensor: np.ndarray, box: tuple[int, ...], swizzle: int) -> np.ndarray:
    """TensorMap of native/tensor_map.h. Sizes, strides and boxes begin with the innermost dimension."""
    rest = 5 - tensor.ndim
    sizes, strides = tensor.shape[::-1] + (1,) * rest, tensor.strides[-2::-1] + (0,) * rest
    packed = struct.pack(
        "<2Q5Q4Q5H3H",
        *(0x70616D2D726F7374, tensor.ctypes.data),
        *(*sizes, *strides[:4]),
        *(*box, *[1] * rest),
        *(swizzle, tensor.itemsize, tensor.ndim),
    )
    array = aligned(128, np.uint8)
    array[: len(packed)] = np.frombuffer(packed, np.uint8)
    return array


COPY_OF_MAP = "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"


def zeroed_map(warp: str) -> str:
    """128 bytes at %s, which the warp of this predicate zeroes, for the fields of a map."""
    return f"mul.lo.u32 %r60, %l, 4; add.u32 %r60, %r60, %s; @{warp} st.shared.b32 [%r60], 0; bar.warp.sync -1;"


def fields_of_map(tensor: np.ndarray, box: tuple[int, ...], swizzle: int, at: str, base: str, thread: str) -> str:
    """The thread of this predicate fills in a map of the tensor, which begins at ``base``; see :func:`tensor_map`."""

    def replace(field: str, bits: int, *values: object) -> str:
        return (
            f"@{thread} tensormap.replace.tile.{field}.shared::cta.b1024.b{bits} [{at}], {', '.join(map(str, values))};"
        )

    types = {1: 0, 2: 1, 4: 2, 8: 4}  # of unsigned integers
    lines = [replace("global_address", 64, base), replace("rank", 32, tensor.ndim - 1)]
    for d, (size, length) in enumerate(zip(tensor.shape[::-1], box, strict=True)):
        lines += [replace("global_dim", 32, d, size), replace("box_dim", 32, d, length)]
        lines += [replace("element_stride", 32, d, 1)]
    lines += [replace("global_stride", 64, d, stride) for d, stride in enumerate(tensor.strides[-2::-1])]
    lines.append(replace("elemtype", 32, types[tensor.itemsize]))
    lines.append(replace("swizzle_mode", 32, (0, 32, 64, 128).index(swizzle)))
    return " ".join([*lines, replace("interleave_layout", 32, 0), replace("fill_mode", 32, 0)])


def copy(to: str, source: str, count: int, threads: int, label: str) -> str:
    """All threads copy so many bytes between shared memory (addresses in %r and %s) and global memory."""
    loop = f"mul.lo.u32 %r60, %t, 4; {label}: setp.ge.u32 %q60, %r60, {count}; @%q60 bra {label}_end;"
    address = []
    for register, k in ((source, 61), (to, 62)):
        if register.startswith(("%r", "%s")):
            loop += f" add.u32 %r{k}, {register}, %r60;"
            address.append(("shared", f"[%r{k}]"))
        else:
            loop += f" cvt.u64.u32 %d{k}, %r60; add.s64 %d{k}, {register}, %d{k};"
            address.append(("global", f"[%d{k}]"))
    (space, place), (other_space, other_place) = address
    loop += f" ld.{space}.b32 %r63, {place}; st.{other_space}.b32 {other_place}, %r63;"
    return loop + f" add.u32 %r60, %r60, {4 * threads}; bra {label}; {label}_end: bar.warp.sync -1;"


def barrier_at(offset: int, arrivals: int = 1) -> str:
    """An mbarrier at this place of shared memory. Its address is then in %r80, and %q80 is true in the first thread."""
    return f"""
        add.u32 %r80, %s, {offset}; setp.eq.u32 %q80, %t, 0;
        @%q80 mbarrier.init.shared::cta.b64 [%r80], {arrivals}; @%q80 fence.mbarrier_init.release.cluster;
        bar.sync 0;"""


def wait(parity: int, label: str) -> str:
    """All threads wait for a phase of the mbarrier at %r80."""
    return f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %q81, [%r80], {parity}; @!%q81 bra {label};"


ALLOCATE = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"


def with_tensor_memory(body: str, barrier: int) -> str:
    """%r70: the address of all of tensor memory, %r71: of this warp's lanes in it. The mbarrier is at %r80."""
    return f"""
        {barrier_at(barrier)} setp.eq.u32 %q70, %w, 0;
        @%q70 {ALLOCATE} [%r80 + 8], 512; @%q70 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
        bar.sync 0; ld.shared.b32 %r70, [%r80 + 8]; shl.b32 %r71, %w, 21; add.u32 %r71, %r71, %r70;
        {body}
        bar.sync 0; @%q70 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r70, 512;"""


# ---- one instruction, lane by lane
def width(kind: str) -> int:
    """Bits of a type such as ``s16`` or ``bf16x2``; 1 for ``pred``."""
    if kind == "pred":
        return 1
    number, _, twice = kind.lstrip("bsuf").partition("x")
    return int(number) * (2 if twice else 1)


def execute(opcode: str, results: str, operands: str, columns: Sequence[Sequence[int]], constants: str = "") -> list:
    """The results of an instruction for every row of operands.

    Args:
        results, operands: the types of the registers, separated by blanks.
        columns: the bits of the values, one column per operand.
        constants: what stands behind the operands.

    Returns:
        The bits of the results: one list if there is one result, else a list of them.
    """
    kinds, inputs = results.split(), operands.split()
    count = len(columns[0])
    lines, names, arrays = [], [], []
    for k, kind in enumerate([*kinds, *inputs]):
        bits = width(kind)
        names.append(f"%{ {1: 'q', 16: 'h', 32: 'r', 64: 'd'}[bits] }{k + 1}")
        array = np.zeros(-(-count // 64) * 64, {1: np.uint32, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits])
        arrays.append(array)
        if k < len(kinds):
            continue
        array[:count] = columns[k - len(kinds)]
        if bits == 1:
            lines.append(f"ld.global.b32 %r90, [%e{k}]; setp.ne.b32 {names[k]}, %r90, 0;")
        else:
            lines.append(f"ld.global.b{bits} {names[k]}, [%e{k}];")
    written = "|".join(names[: len(kinds)])
    lines.append(f"{opcode} {', '.join([written, *names[len(kinds) :], *([constants] if constants else [])])};")
    for k, kind in enumerate(kinds):
        if kind == "pred":
            lines.append(f"selp.b32 %r90, 1, 0, {names[k]}; st.global.b32 [%e{k}], %r90;")
        else:
            lines.append(f"st.global.b{width(kind)} [%e{k}], {names[k]};")
    run("\n".join(lines), *arrays, threads=64, blocks=len(arrays[0]) // 64, checks=False)
    found = [array[:count].tolist() for array in arrays[: len(kinds)]]
    return found[0] if len(found) == 1 else found


# ---- numbers
PRECISION = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def nearest(x: Fraction, kind: str) -> float:
    """The number of a format that is nearest; of two, the even one. Infinity if ``x`` is too large."""
    digits, lowest, highest = PRECISION[kind]
    if x == 0:
        return 0.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, lowest) - digits + 1)
    rounded = round(x / step) * step  # round() of a fraction goes to the even number
    if abs(rounded) >= Fraction(2) ** (highest + 1):
        return float("inf") if x > 0 else float("-inf")
    return float(rounded) if rounded else float("0.0" if x > 0 else "-0.0")


def decode(bits: int, kind: str) -> int | float:
    """The number that a register holds."""
    if kind == "bf16":
        return decode(bits << 16, "f32")
    if kind in PRECISION:
        size = width(kind) // 8
        return float(np.frombuffer(bits.to_bytes(size, "little"), f"<f{size}")[0])
    if kind[0] == "s" and bits >> (width(kind) - 1):
        return bits - (1 << width(kind))
    return bits


def encode(x: float | Fraction, kind: str) -> int:
    """The bits of a number, which is rounded to the format, or of the low bits of an integer."""
    if kind not in PRECISION:
        return int(x) & ((1 << width(kind)) - 1)
    if isinstance(x, (int, Fraction)) or (np.isfinite(x) and x != 0):
        x = nearest(Fraction(x), kind)
    if kind == "bf16":
        return int.from_bytes(np.float32(x).tobytes(), "little") >> 16
    size = width(kind) // 8
    return int.from_bytes(np.dtype(f"f{size}").type(x).tobytes(), "little")


def flushed(x: float, kind: str = "f32") -> float:
    """A denormal number becomes a zero with its sign."""
    return math.copysign(0.0, x) if abs(x) < 2.0 ** PRECISION[kind][1] else x


def is_nan(bits: int, kind: str) -> bool:
    return kind in PRECISION and np.isnan(decode(bits, kind))


def edges(kind: str) -> list[int]:
    """Bits of values of a type with which an instruction is likely to go wrong, and some others."""
    if kind == "pred":
        return [0, 1]
    if kind == "shift":
        return [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31, 2**32 - 1]
    bits = width(kind)
    chance = random.Random(kind)
    if kind not in PRECISION:
        top = 1 << (bits - 1)
        special = [0, 1, 2, 3, 7, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, top // 255 * 85]
        return special + [chance.randrange(2 * top) >> chance.randrange(bits) for _ in range(8)]
    digits, lowest, highest = PRECISION[kind]
    one = Fraction(1)
    sizes = [
        one, 3 * one, one / 3, 1 + one / 2 ** (digits - 1), 1 - one / 2**digits, one * 5 / 2, one / 2,
        one * 2**lowest, one * 2**lowest / 2, one * 2**lowest / 2 ** (digits - 1), one * 2**lowest * 2 / 3,
        one * 2**highest * (2 - one / 2 ** (digits - 1)), one * 2**highest, one * 12345 / 64,
    ]  # fmt: skip
    found = [encode(x, kind) for x in sizes] + [encode(-x, kind) for x in sizes]
    found += [encode(float(x), kind) for x in ("0.0", "-0.0", "inf", "-inf", "nan")]
    return found + [encode((chance.random() - 0.5) * 16, kind) for _ in range(6)]


def rows_of(kinds: Sequence[str], most: int = 700) -> list[tuple[int, ...]]:
    """Combinations of the edges of several types: all of them, or a sample."""
    lists = [edges(kind) for kind in kinds]
    total = int(np.prod([len(values) for values in lists]))
    chance = random.Random(" ".join(kinds))
    numbers = range(total) if total <= most else chance.sample(range(total), most)
    found = []
    for number in numbers:
        row = []
        for values in lists:
            number, at = divmod(number, len(values))
            row.append(values[at])
        found.append(tuple(row))
    return found


# ---- faulty programs
class Program(NamedTuple):
    """A faulty program and its twin without the fault.

    A line that ends with ``//-`` is in the faulty program only, one with ``//+`` in the other only. The error matches
    the message and names the lines that end with ``!``.
    """

    name: str
    body: str
    message: str
    threads: int = 64
    blocks: int = 1
    arrays: Callable[[], list[np.ndarray]] = lambda: [np.zeros((256, 4), np.uint32)]
    always: bool = True  # whether the fault is noticed in every order of the warps, and not only in the usual one


def lines_of(body: str, mark: str) -> str:
    """Without the lines of the other program."""
    return "\n".join(line for line in body.split("\n") if not line.rstrip(" !").endswith("//" + mark))


def check_program(program: Program) -> None:
    options = {"threads": program.threads, "blocks": program.blocks, "shared": 4096}
    arrays = program.arrays()
    body = lines_of(program.body, "+")
    for schedule in range(4):
        run(lines_of(program.body, "-"), *arrays, schedule=schedule, **options)
        if program.always:
            with pytest.raises(Fault):
                run(body, *arrays, schedule=schedule, **options)
    with pytest.raises(Fault, match=program.message) as caught:
        run(body, *arrays, **options)
    text = kernel_text(body, len(arrays), [a.strides[0] for a in arrays], 4096)
    for number, line in enumerate(text.split("\n"), 1):
        if re.search(r"//.*!$", line):
            assert f"[PTX line {number}," in str(caught.value), f"{line} is not named in {caught.value}"


def each_program(programs: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", programs, ids=lambda p: p.name)


# ---- instructions with definitions
class Case(NamedTuple):
    """An opcode; the types of its result and operands; a function of their numbers; constants behind the operands."""

    opcode: str
    types: str
    definition: Callable
    constants: str = ""


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """A test of these cases, of which some may have marks."""
    plain = [case if isinstance(case, Case) else case.values[0] for case in cases]
    TESTED.update((c.opcode, len(c.types.split()) + bool(c.constants)) for c in plain)
    return pytest.mark.parametrize("case", cases, ids=[f"{c.opcode} {c.constants}".strip() for c in plain])


def check(case: Case, rows: list[tuple[int, ...]] | None = None) -> None:
    """Every row of operands, given as bits, has the result that the definition gives."""
    result, *operands = case.types.split()
    rows = rows or rows_of(operands)
    operands = ["u32" if kind == "shift" else kind for kind in operands]
    found = execute(case.opcode, result, " ".join(operands), list(zip(*rows, strict=True)), case.constants)
    for row, bits in zip(rows, found, strict=True):
        numbers = [decode(x, kind) for x, kind in zip(row, operands, strict=True)]
        wanted = case.definition(*numbers)
        if wanted is None:
            continue
        if is_nan(bits, result) and np.isnan(wanted):
            continue
        assert bits == encode(wanted, result), f"{case.opcode} of {numbers} gives {decode(bits, result)}, not {wanted}"
