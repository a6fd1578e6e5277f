"""The emulator's matrix instructions, against products by numpy of matrices that are placed as the PTX ISA says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from emulated_ptx import ALLOCATE, TESTED, about, aligned, copy, run, swizzled, wait, with_tensor_memory

ROW, COLUMN = np.arange(32) // 4, np.arange(32) % 4  # of a lane in a fragment: its group, and its number in the group
SIZE = {"bf16": 2, "f16": 2, "tf32": 4}
DEPTH = {"bf16": 16, "f16": 16, "tf32": 8}  # K of one instruction


def bits_of(numbers: np.ndarray, kind: str) -> np.ndarray:
    """Small integers in a format; of tf32, the bits that are no part of it are set."""
    single = numbers.astype(np.float32)
    if kind == "bf16":
        return (single.view(np.uint32) >> 16).astype(np.uint16)
    return single.astype(np.float16).view(np.uint16) if kind == "f16" else single.view(np.uint32) | 0x1FFF


def small(*shape: int, seed: int = 0) -> np.ndarray:
    """Integers whose products and sums are exact in every format."""
    return np.random.default_rng([seed, *shape]).integers(-8, 9, shape)


# ---- ldmatrix, stmatrix
MOVES = [(count, transposed) for count in (1, 2, 4) for transposed in ("", "trans.")]


@about(*(f"{op}.sync.aligned.m8n8.x{count}.{t}shared.b16" for op in ("ldmatrix", "stmatrix") for count, t in MOVES))
def test_rows_of_8x8_matrices() -> None:
    """Lane 8 j + r has the address of row r of matrix j; lane l gets elements 2 (l % 4) and the next of row l / 4."""
    for count, transposed in MOVES:
        content = np.random.default_rng(count).integers(0, 1 << 16, (32, 8)).astype(np.uint16)
        place = np.random.default_rng(0).permutation(32)  # of row k among the 16 bytes of shared memory
        registers = "{" + ", ".join(f"%r{k + 1}" for k in range(count)) + "}"
        form = f"sync.aligned.m8n8.x{count}.{transposed}shared.b16"
        memory, found, back = aligned((32, 8), np.uint16), np.zeros((32, 4), np.uint32), np.zeros((32, 8), np.uint16)
        memory[place] = content
        stores = " ".join(f"st.global.b32 [%e2 + {4 * k}], %r{k + 1};" for k in range(count))
        body = f"""
            {copy("%s", "%p0", 512, 32, "in")} add.u32 %r81, %s, 512;
            ld.global.b32 %r80, [%e1]; mad.lo.u32 %r79, %r80, 16, %s; mad.lo.u32 %r80, %r80, 16, %r81;
            ldmatrix.{form} {registers}, [%r79]; {stores}
            {copy("%r81", "%p0", 512, 32, "fill")}
            stmatrix.{form} [%r80], {registers}; {copy("%p3", "%r81", 512, 32, "out")}"""
        run(body, memory, place.astype(np.uint32), found, back, shared=1024)
        matrices = content.reshape(4, 8, 8)[:count]
        wanted = matrices.transpose(0, 2, 1) if transposed else matrices
        halves = found.view(np.uint16).reshape(32, 4, 2)[:, :count]
        for half in range(2):
            np.testing.assert_array_equal(halves[:, :, half], wanted[:, ROW, 2 * COLUMN + half].T)
        np.testing.assert_array_equal(back, memory)  # what was loaded goes back to where it came from


# ---- mma.sync
def left_fragment(a: np.ndarray) -> np.ndarray:
    """The four registers of each lane for 16 rows of A, given as bits; also of wgmma."""
    parts = []
    for k, row in ((0, 0), (0, 8), (1, 0), (1, 8)):
        if a.itemsize == 4:
            parts.append(a[ROW + row, COLUMN + 4 * k])
        else:
            low, high = (a[ROW + row, 8 * k + 2 * COLUMN + half].astype(np.uint32) for half in range(2))
            parts.append(low | high << 16)
    return np.stack(parts, 1)


def right_fragment(b: np.ndarray) -> np.ndarray:
    """The two registers of each lane for B with 8 columns, given as bits."""
    if b.itemsize == 4:
        return np.stack([b[COLUMN + 4 * k, ROW] for k in range(2)], 1)
    words = [[b[8 * k + 2 * COLUMN + half, ROW].astype(np.uint32) for half in range(2)] for k in range(2)]
    return np.stack([low | high << 16 for low, high in words], 1)


def sum_fragment(d: np.ndarray) -> np.ndarray:
    """The registers of each lane for 16 rows of the accumulator: four for every 8 columns."""
    parts = [d[ROW + 8 * (r // 2), 8 * n + 2 * COLUMN + r % 2] for n in range(d.shape[1] // 8) for r in range(4)]
    return np.stack(parts, 1).astype(np.float32)


def mma_opcode(kind: str) -> str:
    return f"mma.sync.aligned.m16n8k{DEPTH[kind]}.row.col.f32.{kind}.{kind}.f32"


@pytest.mark.parametrize("kind", SIZE)
def test_mma_sync(kind) -> None:
    a, b, c = small(16, DEPTH[kind]), small(DEPTH[kind], 8, seed=1), small(16, 8, seed=2)
    found = np.zeros((32, 4), np.float32)
    body = f"""
        {" ".join(f"ld.global.b32 %r{k + 1}, [%e0 + {4 * k}];" for k in range(4))}
        {" ".join(f"ld.global.b32 %r{k + 7}, [%e2 + {4 * k}];" for k in range(4))}
        ld.global.b32 %r5, [%e1]; ld.global.b32 %r6, [%e1 + 4];
        {mma_opcode(kind)} {{%r11, %r12, %r13, %r14}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};
        {" ".join(f"st.global.b32 [%e3 + {4 * k}], %r{k + 11};" for k in range(4))}"""
    run(body, left_fragment(bits_of(a, kind)), right_fragment(bits_of(b, kind)), sum_fragment(c), found)
    np.testing.assert_array_equal(found, sum_fragment(a @ b + c))


TESTED.update((mma_opcode(kind), None) for kind in SIZE)


# ---- matrices in shared memory
class Placed(NamedTuple):
    """A matrix in shared memory: its bytes, where each instruction's part starts, and the offsets of its descriptor."""

    content: np.ndarray
    starts: list[int]
    leading: int
    stride: int
    swizzle: int
    transposed: bool


def placed_along_k(matrix: np.ndarray, swizzle: int) -> Placed:
    """Rows of A, or columns of B, whose elements for all k lie together, in blocks as wide as the swizzle mode is."""
    rows, wide = len(matrix), matrix.shape[1] * matrix.itemsize
    content = np.ascontiguousarray(matrix).view(np.uint8)
    if not swizzle:  # core matrices of 8 rows with 16 bytes each: those of the same rows lie together
        core = content.reshape(rows // 8, 8, wide // 16, 16).transpose(0, 2, 1, 3)
        return Placed(core.ravel(), [256 * step for step in range(wide // 32)], 128, 8 * wide, 0, False)
    blocks = [swizzled(content[:, at : at + swizzle], swizzle) for at in range(0, wide, swizzle)]
    starts = [at // swizzle * rows * swizzle + at % swizzle for at in range(0, wide, 32)]
    return Placed(np.concatenate(blocks).ravel(), starts, 16, 8 * swizzle, swizzle, False)


def placed_across_k(matrix: np.ndarray, swizzle: int) -> Placed:
    """The same with the elements for one k together."""
    depth, wide = matrix.shape[1], len(matrix) * matrix.itemsize
    content = np.ascontiguousarray(matrix.T).view(np.uint8)
    steps = range(depth // 16)
    if not swizzle:  # core matrices of 8 k with 16 bytes each: those of the same rows lie together
        core = content.reshape(depth, wide // 16, 16).transpose(1, 0, 2)
        return Placed(core.ravel(), [256 * step for step in steps], 128, 16 * depth, 0, True)
    blocks = [swizzled(content[:, at : at + swizzle], swizzle) for at in range(0, wide, swizzle)]
    starts = [16 * swizzle * step for step in steps]
    return Placed(np.concatenate(blocks).ravel(), starts, depth * swizzle, 8 * swizzle, swizzle, True)


def descriptor(register: str, base: int, p: Placed, step: int, more: int) -> str:
    """Makes the descriptor of one instruction's part in a register of 64 bits; ``more``: its highest fields."""
    rest = (p.leading >> 4) << 16 | (p.stride >> 4) << 32 | more
    return f"""add.u32 %r61, %s, {base + p.starts[step]}; shr.u32 %r61, %r61, 4;
        cvt.u64.u32 {register}, %r61; or.b64 {register}, {register}, {rest};"""


def names(prefix: str, count: int, first: int) -> str:
    return "{" + ", ".join(f"%{prefix}{first + k}" for k in range(count)) + "}"


# ---- wgmma
class Product(NamedTuple):
    """N; the placing of A, None: in registers, and of B: swizzle, and whether it lies across k."""

    kind: str
    columns: int
    a: tuple[int, bool] | None
    b: tuple[int, bool]
    add: bool = False


PRODUCTS = [
    *[Product("bf16", 64, (swizzle, False), (swizzle, False), True) for swizzle in (0, 32, 64, 128)],
    *[Product("f16", 64, (swizzle, True), (swizzle, True)) for swizzle in (0, 32, 64, 128)],
    *[
        Product("tf32", n, (swizzle, False), (swizzle, False))
        for n, swizzle in ((8, 0), (16, 32), (40, 64), (128, 128))
    ],
    *[Product(kind, 24, None, (64, False), True) for kind in SIZE],
    *[Product("bf16", n, (128, False), (128, True)) for n in (64, 128, 256)],
    Product("f16", 8, (64, True), (0, True)),
    Product("bf16", 96, None, (32, True)),
    Product("bf16", 256, None, (128, False), True),
]


def wgmma_opcode(p: Product) -> str:
    return f"wgmma.mma_async.sync.aligned.m64n{p.columns}k{DEPTH[p.kind]}.f32.{p.kind}.{p.kind}"


TESTED.update((wgmma_opcode(p), None) for p in PRODUCTS)
SWIZZLE_OF_WGMMA = {0: 0, 128: 1 << 62, 64: 2 << 62, 32: 3 << 62}


@about("wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned")
@pytest.mark.parametrize("p", PRODUCTS, ids=str)
def test_wgmma(p) -> None:
    """Several instructions in a row, for K of 128 bytes."""
    depth, columns, size = 128 // SIZE[p.kind], p.columns, SIZE[p.kind]
    a, b, c = small(64, depth), small(columns, depth, seed=1), small(64, columns, seed=2)
    place = [placed_across_k if across else placed_along_k for _, across in (p.a or p.b, p.b)]
    left, right = place[0](bits_of(a, p.kind), (p.a or p.b)[0]), place[1](bits_of(b, p.kind), p.b[0])
    fragments = [bits_of(a, p.kind)[:, k : k + DEPTH[p.kind]] for k in range(0, depth, DEPTH[p.kind])]
    fragments = [np.concatenate([left_fragment(f[rows : rows + 16]) for rows in range(0, 64, 16)]) for f in fragments]
    sums = [sum_fragment(x[rows : rows + 16]) for x in (c, a @ b.T + c * p.add) for rows in range(0, 64, 16)]
    start, wanted = np.concatenate(sums[:4]), np.concatenate(sums[4:])
    base, first = 64 * 128, 100 + columns // 2
    steps = []
    for k in range(len(fragments)):
        of_a = names("r", 4, first + 4 * k) if p.a is None else "%d1"
        transposed = [] if size == 4 else [right.transposed] if p.a is None else [left.transposed, right.transposed]
        flags = ", ".join(str(int(flag)) for flag in (1, 1, *transposed))
        steps.append(f"""
            {descriptor("%d1", 0, left, k, SWIZZLE_OF_WGMMA[left.swizzle])}
            {descriptor("%d2", base, right, k, SWIZZLE_OF_WGMMA[right.swizzle])}
            setp.ne.u32 %q1, {int(k > 0 or p.add)}, 0;
            {wgmma_opcode(p)} {names("r", columns // 2, 100)}, {of_a}, %d2, %q1, {flags};""")
    in_registers = np.concatenate(fragments, 1)
    loads = [f"ld.global.b32 %r{first + k}, [%e2 + {4 * k}];" for k in range(16)]
    loads += [f"ld.global.b32 %r{100 + k}, [%e3 + {4 * k}];" for k in range(columns // 2)]
    stores = [f"st.global.b32 [%e3 + {4 * k}], %r{100 + k};" for k in range(columns // 2)]
    body = f"""
        {" ".join(loads)} add.u32 %r79, %s, {base};
        {copy("%s", "%p0", left.content.size, 128, "a")} {copy("%r79", "%p1", right.content.size, 128, "b")}
        fence.proxy.async.shared::cta; bar.sync 0;
        wgmma.fence.sync.aligned; {" ".join(steps)} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {" ".join(stores)}"""
    run(body, left.content, right.content, in_registers, start, threads=128, shared=base + right.content.size)
    np.testing.assert_array_equal(start, wanted)


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_groups_of_wgmma(schedule) -> None:
    """Two warpgroups with two products each: the older one may be used while the newer one is on its way."""
    a, b = small(128, 16, seed=1), small(8, 16)
    right = placed_along_k(bits_of(b, "f16"), 0)
    left = np.concatenate([left_fragment(bits_of(a[rows : rows + 16], "f16")) for rows in range(0, 128, 16)])
    found = np.zeros((256, 2, 4), np.float32)
    opcode = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
    loads = " ".join(f"ld.global.b32 %r{k + 1}, [%e0 + {4 * k}];" for k in range(4))
    stores = [
        " ".join(f"st.global.b32 [%e2 + {16 * g + 4 * k}], %r{100 + 10 * g + k};" for k in range(4)) for g in (0, 1)
    ]
    body = f"""
        {loads} {copy("%s", "%p1", 256, 256, "b")} fence.proxy.async.shared::cta; bar.sync 0; setp.ne.u32 %q1, 0, 0;
        {descriptor("%d1", 0, right, 0, 0)} wgmma.fence.sync.aligned;
        {opcode} {names("r", 4, 100)}, {names("r", 4, 1)}, %d1, %q1, 1, 1, 0; wgmma.commit_group.sync.aligned;
        {opcode} {names("r", 4, 110)}, {names("r", 4, 1)}, %d1, %q1, 1, 1, 0; wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 1; {stores[0]} wgmma.wait_group.sync.aligned 0; {stores[1]}"""
    run(body, left, right.content, found, threads=256, shared=256, schedule=schedule)
    wanted = np.concatenate([sum_fragment((a @ b.T)[rows : rows + 16]) for rows in range(0, 128, 16)])
    np.testing.assert_array_equal(found[:, 0], wanted)
    np.testing.assert_array_equal(found[:, 1], wanted)


# ---- tcgen05
class TensorProduct(NamedTuple):
    """As Product, with the number of rows. A is in tensor memory if its placing is None."""

    kind: str
    rows: int
    columns: int
    a: tuple[int, bool] | None
    b: tuple[int, bool]
    add: bool = False


TENSOR_PRODUCTS = [
    *[TensorProduct("bf16", 128, 64, (swizzle, False), (swizzle, False), True) for swizzle in (0, 32, 64, 128)],
    *[TensorProduct("f16", 128, 64, (swizzle, True), (swizzle, True)) for swizzle in (0, 32, 64, 128)],
    *[TensorProduct("tf32", 128, 32, (swizzle, False), (swizzle, False)) for swizzle in (0, 32, 64, 128)],
    *[TensorProduct(kind, rows, 16, None, (128, False), True) for kind in SIZE for rows in (64, 128)],
    TensorProduct("bf16", 64, 256, (128, True), (128, False)),
    TensorProduct("tf32", 64, 8, (64, False), (32, False), True),
]
SWIZZLE_OF_TCGEN05 = {0: 0, 128: 2 << 61, 64: 4 << 61, 32: 6 << 61}
FORMAT = {"f16": 0, "bf16": 1, "tf32": 2}


def tensor_moves(what: str, column: int, count: int, array: str) -> str:
    """Between tensor memory and a global array with one row per thread, eight columns at a time."""
    lines = []
    for at in range(0, count, 8):
        address, registers = f"[%r71 + {column + at}]", names("r", 8, 300)
        if what == "st":
            lines += [f"ld.global.b32 %r{300 + k}, [{array} + {4 * (at + k)}];" for k in range(8)]
            lines.append(f"tcgen05.st.sync.aligned.32x32b.x8.b32 {address}, {registers};")
        else:
            lines.append(
                f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {registers}, {address}; tcgen05.wait::ld.sync.aligned;"
            )
            lines += [f"st.global.b32 [{array} + {4 * (at + k)}], %r{300 + k};" for k in range(8)]
    return "\n".join(lines)


COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64"


TESTED.update((f"tcgen05.mma.cta_group::1.kind::{kind}", None) for kind in ("f16", "tf32"))


@about(
    ALLOCATE, COMMIT, "tcgen05.dealloc.cta_group::1.sync.aligned.b32", "tcgen05.st.sync.aligned.32x32b.x8.b32",
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned", "tcgen05.fence::before_thread_sync",
    "tcgen05.ld.sync.aligned.32x32b.x8.b32", "tcgen05.wait::ld.sync.aligned", "tcgen05.wait::st.sync.aligned",
)  # fmt: skip
@pytest.mark.parametrize("p", TENSOR_PRODUCTS, ids=str)
def test_tcgen05(p) -> None:
    """Row r of 64 rows is in lane 32 (r / 16) + r % 16 of tensor memory, two elements of 16 bits of A in a word."""
    depth, columns = 128 // SIZE[p.kind], p.columns
    a, b, c = small(p.rows, depth), small(columns, depth, seed=1), small(p.rows, columns, seed=2)
    place = [placed_across_k if across else placed_along_k for _, across in (p.a or p.b, p.b)]
    left, right = place[0](bits_of(a, p.kind), (p.a or p.b)[0]), place[1](bits_of(b, p.kind), p.b[0])
    lanes = np.arange(128) if p.rows == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
    in_tensor_memory, sums = np.zeros((128, 32), np.uint32), np.zeros((128, columns), np.float32)
    in_tensor_memory[lanes] = np.ascontiguousarray(bits_of(a, p.kind)).view(np.uint32)
    sums[lanes] = c
    base = 128 * 128
    instruction = 1 << 4 | FORMAT[p.kind] << 7 | FORMAT[p.kind] << 10 | left.transposed << 15 | right.transposed << 16
    instruction |= columns // 8 << 17 | p.rows // 16 << 24
    opcode, kind = "tcgen05.mma.cta_group::1.kind", "tf32" if p.kind == "tf32" else "f16"
    steps = []
    for k in range(depth // DEPTH[p.kind]):
        of_a = f"[%r70 + {8 * k}]" if p.a is None else "%d1"
        steps.append(f"""
            {descriptor("%d1", 0, left, k, SWIZZLE_OF_TCGEN05[left.swizzle] | 1 << 46)}
            {descriptor("%d2", base, right, k, SWIZZLE_OF_TCGEN05[right.swizzle] | 1 << 46)}
            setp.ne.u32 %q1, {int(k > 0 or p.add)}, 0;
            @%q80 {opcode}::{kind} [%r70 + 64], {of_a}, %d2, {instruction}, %q1;""")
    body = f"""
        add.u32 %r79, %s, {base};
        {copy("%s", "%p0", left.content.size, 128, "a")} {copy("%r79", "%p1", right.content.size, 128, "b")}
        {tensor_moves("st", 0, 32, "%e2")} {tensor_moves("st", 64, columns, "%e3")} tcgen05.wait::st.sync.aligned;
        fence.proxy.async.shared::cta; tcgen05.fence::before_thread_sync; bar.sync 0; tcgen05.fence::after_thread_sync;
        {" ".join(steps)}
        @%q80 {COMMIT} [%r80];
        {wait(0, "done")} tcgen05.fence::after_thread_sync; {tensor_moves("ld", 64, columns, "%e3")}"""
    barrier = base + right.content.size
    arrays = (left.content, right.content, in_tensor_memory, sums)
    run(with_tensor_memory(body, barrier), *arrays, threads=128, shared=barrier + 16)
    np.testing.assert_array_equal(sums[lanes], a @ b.T + c * p.add)


@about("tcgen05.ld.sync.aligned.16x32bx2.x2.b32", "tcgen05.st.sync.aligned.16x32bx2.x2.b32")
def test_halves_of_a_warp_in_other_columns() -> None:
    """In the form 16x32bx2, lanes 16 to 31 access the same 16 lanes of tensor memory some columns further."""
    source, found, memory = (
        small(128, 2).astype(np.uint32),
        np.zeros((128, 2), np.uint32),
        np.zeros((128, 8), np.uint32),
    )
    body = f"""
        {tensor_moves("st", 0, 8, "%e2")} tcgen05.wait::st.sync.aligned;
        ld.global.b32 %r1, [%e0]; ld.global.b32 %r2, [%e0 + 4];
        tcgen05.st.sync.aligned.16x32bx2.x2.b32 [%r71], 4, {{%r1, %r2}}; tcgen05.wait::st.sync.aligned;
        tcgen05.ld.sync.aligned.16x32bx2.x2.b32 {{%r3, %r4}}, [%r71], 4; tcgen05.wait::ld.sync.aligned;
        st.global.b32 [%e1], %r3; st.global.b32 [%e1 + 4], %r4;
        {tensor_moves("ld", 0, 8, "%e2")}"""
    run(with_tensor_memory(body, 0), source, found, memory, threads=128, shared=16)
    np.testing.assert_array_equal(found, source)
    wanted = np.zeros_like(memory).reshape(4, 32, 8)
    of_warps = source.reshape(4, 2, 16, 2)
    wanted[:, :16, 0:2], wanted[:, :16, 4:6] = of_warps[:, 0], of_warps[:, 1]
    np.testing.assert_array_equal(memory.reshape(4, 32, 8), wanted)
