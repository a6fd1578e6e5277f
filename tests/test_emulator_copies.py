"""The emulator's asynchronous copies, and the barriers that tell when they are over, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated_ptx import (
    COPY_OF_MAP,
    TESTED,
    about,
    aligned,
    barrier_at,
    copy,
    fields_of_map,
    run,
    swizzled,
    tensor_map,
    wait,
    zeroed_map,
)
from emulator import Kernel
from emulator.memory import memory_of


def some_bytes(count: int, seed: int = 0) -> np.ndarray:
    array = aligned(count, np.uint8)
    array[...] = np.random.default_rng(seed).integers(1, 256, count)
    return array


# ---- cp.async
ASYNC = ["cp.async.ca.shared.global", "cp.async.ca.shared::cta.global.L2::128B", "cp.async.cg.shared.global"]
TESTED.update((opcode, None) for opcode in ASYNC)


@pytest.mark.parametrize(
    ("opcode", "size"), [(o, size) for o in ASYNC for size in (4, 8, 16) if "ca" in o or size == 16]
)
@pytest.mark.parametrize("filled", [None, 0, 4, 16])
def test_cp_async(opcode, size, filled) -> None:
    """What is not copied becomes zero, and nothing is read where nothing is copied."""
    source, found = some_bytes(64 * size).reshape(64, size), aligned((64, size), np.uint8)
    filled = filled if filled is None else min(filled, size)
    null = "mov.b64 %e0, 0;" if filled == 0 else ""
    body = f"""
        {null} mad.lo.u32 %r1, %t, {size}, %s; mov.u32 %r2, {filled or 0};
        {opcode} [%r1], [%e0], {size}{"" if filled is None else ", %r2"};
        cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
        {copy("%p1", "%s", 64 * size, 64, "out")}"""
    run(body, source, found, threads=64, shared=64 * size)
    wanted = source.copy()
    wanted[:, size if filled is None else filled :] = 0
    np.testing.assert_array_equal(found, wanted)


@about("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all")
def test_groups_of_cp_async() -> None:
    """Waiting for all but the newest group is enough for the older ones; wait_all is for what is in no group, too."""
    source, found = some_bytes(32 * 12).reshape(32, 12), np.zeros((32, 12), np.uint8)
    body = """
        mad.lo.u32 %r1, %t, 12, %s;
        cp.async.ca.shared.global [%r1], [%e0], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r1 + 4], [%e0 + 4], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%r1 + 8], [%e0 + 8], 4;
        cp.async.wait_group 1; ld.shared.b32 %r2, [%r1]; st.global.b32 [%e1], %r2;
        cp.async.wait_all; ld.shared.b32 %r2, [%r1 + 4]; ld.shared.b32 %r3, [%r1 + 8];
        st.global.b32 [%e1 + 4], %r2; st.global.b32 [%e1 + 8], %r3;"""
    run(body, source, found, shared=32 * 12)
    np.testing.assert_array_equal(found, source)


# ---- mbarriers
@about(
    "mbarrier.init.shared::cta.b64", "mbarrier.arrive.shared::cta.b64", "mbarrier.try_wait.parity.shared::cta.b64",
    "mbarrier.arrive.release.cta.shared::cta.b64", "mbarrier.inval.shared::cta.b64",
)  # fmt: skip
@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_mbarrier_hands_over_in_phases(schedule) -> None:
    """One warp writes, three read, and the writer waits for the readers before it writes again."""
    found = np.zeros((128, 3), np.uint32)
    rounds = "".join(
        f"""
        @%q2 bra read{k};
        add.u32 %r2, %t, {100 * k}; st.shared.b32 [%r1], %r2;
        mbarrier.arrive.shared::cta.b64 _, [%r80]; {wait(k % 2, f"full{k}").replace("%r80", "%r80 + 8")} bra next{k};
        read{k}: {wait(k % 2, f"empty{k}")} ld.shared.b32 %r3, [%r1]; st.global.b32 [%e0 + {4 * k}], %r3;
        mbarrier.arrive.release.cta.shared::cta.b64 _, [%r80 + 8], 1;
        next{k}: bar.warp.sync -1;"""
        for k in range(3)
    )
    body = f"""
        {barrier_at(128, 32)} @%q80 mbarrier.init.shared::cta.b64 [%r80 + 8], 96; bar.sync 0;
        setp.ne.u32 %q2, %w, 0; mad.lo.u32 %r1, %l, 4, %s;
        {rounds}
        bar.sync 0; @%q80 mbarrier.inval.shared::cta.b64 [%r80]; @%q80 mbarrier.inval.shared::cta.b64 [%r80 + 8];"""
    run(body, found, threads=128, shared=144, schedule=schedule)
    for k in range(3):
        assert found[32:, k].tolist() == [100 * k + lane for lane in range(32)] * 3


@about("mbarrier.test_wait.parity.shared::cta.b64", "mbarrier.arrive.shared.b64", "mbarrier.init.shared.b64")
def test_phase_ends_with_the_last_arrival() -> None:
    """A wait for the parity of the phase before the first one does not wait."""
    found = np.zeros(5, np.uint32)
    look = """mbarrier.test_wait.parity.shared::cta.b64 %q1, [%s], {};
        selp.b32 %r1, 1, 0, %q1; st.global.b32 [%p0 + {}], %r1;"""
    body = f"""
        mbarrier.init.shared.b64 [%s], 3;
        {look.format(1, 0)} {look.format(0, 4)}
        mov.u32 %r2, 2; mbarrier.arrive.shared.b64 _, [%s], %r2; {look.format(0, 8)}
        mbarrier.arrive.shared.b64 _, [%s]; {look.format(0, 12)} {look.format(1, 16)}"""
    run(body, found, threads=1, shared=8)
    assert found.tolist() == [1, 0, 0, 1, 0]


# ---- bulk copies of bytes
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.global.shared::cta.bulk_group"


@about(
    LOAD, STORE, "cp.async.bulk.commit_group", "cp.async.bulk.wait_group", "cp.async.bulk.wait_group.read",
    "fence.proxy.async", "fence.proxy.async.shared::cta", "fence.proxy.async.global",
    "fence.mbarrier_init.release.cluster",
    "mbarrier.arrive.expect_tx.shared::cta.b64", "mbarrier.expect_tx.relaxed.cta.shared::cta.b64",
)  # fmt: skip
@pytest.mark.parametrize("count", [16, 48, 4096])
def test_bulk_copy(count) -> None:
    """There in two parts that one mbarrier counts, and back."""
    source, found, kept = some_bytes(2 * count), aligned(2 * count, np.uint8), np.zeros(2 * count, np.uint8)
    body = f"""
        {barrier_at(2 * count)}
        @%q80 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r80], {count};
        @%q80 {LOAD} [%s], [%p0], {count}, [%r80];
        @%q80 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r80], {count};
        add.u32 %r1, %s, {count}; mov.u32 %r2, {count};
        @%q80 {LOAD} [%r1], [%p0 + {count}], %r2, [%r80];
        {wait(0, "wait")}
        {copy("%p2", "%s", 2 * count, 64, "out")}
        fence.proxy.async.shared::cta; fence.proxy.async; fence.proxy.async.global; bar.sync 0;
        @%q80 {STORE} [%p1], [%s], {count}; @%q80 cp.async.bulk.commit_group;
        @%q80 {STORE} [%p1 + {count}], [%r1], %r2; @%q80 cp.async.bulk.commit_group;
        @%q80 cp.async.bulk.wait_group.read 1; @%q80 cp.async.bulk.wait_group 0;"""
    run(body, source, found, kept, threads=64, shared=2 * count + 8)
    np.testing.assert_array_equal(found, source)
    np.testing.assert_array_equal(kept, source)


# ---- bulk copies of boxes of tensors
def overlap(tensor: np.ndarray, corner: tuple[int, ...], box: tuple[int, ...]) -> tuple[tuple, tuple]:
    """Slices of the tensor and of the box where they meet. Of corner and box, the innermost dimension is the first."""
    inside, of_box = [], []
    for size, start, length in zip(tensor.shape, corner[::-1], box[::-1], strict=True):
        low, high = max(start, 0), max(min(start + length, size), max(start, 0))
        inside.append(slice(low, high))
        of_box.append(slice(low - start, high - start))
    return tuple(inside), tuple(of_box)


def in_shared_memory(box: np.ndarray, swizzle: int) -> np.ndarray:
    """The bytes of a box: row after row, and in each row the pieces of 16 bytes permuted as the swizzle mode says."""
    rows = np.ascontiguousarray(box).view(np.uint8).reshape(-1, box.shape[-1] * box.itemsize)
    return swizzled(rows, swizzle).ravel()


# The sizes and the box, innermost dimension last as in numpy; corners as in PTX, innermost first; the type.
BOXES = [
    ((100,), (32,), [(0,), (64,), (90,), (-5,), (-1,), (200,)], np.float32),
    ((20, 64), (8, 32), [(0, 0), (32, 16), (-8, 3), (40, -2), (64, 0)], np.uint16),
    ((5, 7, 48), (2, 3, 16), [(0, 0, 0), (40, 5, 4), (-16, -1, -1)], np.uint8),
    ((3, 2, 5, 16), (2, 1, 4, 8), [(0, 0, 0, 0), (12, 3, 1, 2), (0, -2, 0, 1)], np.float32),
    ((2, 3, 2, 5, 16), (1, 2, 2, 3, 8), [(0, 0, 0, 0, 0), (10, 4, 1, 2, 1), (-4, 0, -1, 0, 0)], np.uint64),
]
SWIZZLED = [
    ((40, 256 // n), (24, swizzle // n), [(0, 0), (128 // n, 20), (-16 // n, -3), (-20 // n, 1)], f"u{n}", swizzle)
    for swizzle in (32, 64, 128)
    for n in (1, 2, 4)
]
CASES = [(*case, 0) for case in BOXES] + SWIZZLED


def padded(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A tensor whose rows have a gap of 32 bytes behind them."""
    whole = aligned((*shape[:-1], shape[-1] + 32 // np.dtype(dtype).itemsize), dtype)
    return whole[..., : shape[-1]]


@pytest.mark.parametrize(("shape", "box", "corners", "dtype", "swizzle"), CASES)
def test_load_of_a_box(shape, box, corners, dtype, swizzle) -> None:
    """What sticks out of the tensor is zero, and counts among the bytes."""
    tensor = padded(shape, dtype)
    tensor[...] = np.arange(1, tensor.size + 1).reshape(shape)
    count = int(np.prod(box)) * tensor.itemsize
    for corner in corners:
        at = ", ".join(map(str, corner))
        found = np.zeros(count, np.uint8)
        body = f"""
            {barrier_at(count)}
            @%q80 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r80], {count};
            @%q80 cp.async.bulk.tensor.{len(shape)}d.shared::cluster.global.mbarrier::complete_tx::bytes
                [%s], [%p1, {{{at}}}], [%r80];
            {wait(0, "wait")} {copy("%p2", "%s", count, 64, "out")}"""
        run(body, tensor, tensor_map(tensor, box[::-1], swizzle), found, threads=64, shared=count + 16)
        wanted = np.zeros(box, dtype)
        inside, of_box = overlap(tensor, corner, box[::-1])
        wanted[of_box] = tensor[inside]
        np.testing.assert_array_equal(found, in_shared_memory(wanted, swizzle))


@pytest.mark.parametrize(("shape", "box", "corners", "dtype", "swizzle"), CASES)
def test_store_of_a_box(shape, box, corners, dtype, swizzle) -> None:
    """What sticks out of the tensor is not written."""
    for corner in corners:
        at = ", ".join(map(str, corner))
        tensor, content = padded(shape, dtype), np.arange(1, int(np.prod(box)) + 1).astype(dtype).reshape(box)
        placed = in_shared_memory(content, swizzle)
        body = f"""
            setp.eq.u32 %q80, %t, 0; {copy("%s", "%p2", placed.size, 64, "fill")}
            fence.proxy.async.shared::cta; bar.sync 0;
            @%q80 cp.async.bulk.tensor.{len(shape)}d.global.shared::cta.tile.bulk_group [%p1, {{{at}}}], [%s];
            @%q80 cp.async.bulk.commit_group; @%q80 cp.async.bulk.wait_group 0;"""
        run(body, tensor, tensor_map(tensor, box[::-1], swizzle), placed, threads=64, shared=placed.size)
        wanted = np.zeros(shape, dtype)
        inside, of_box = overlap(tensor, corner, box[::-1])
        wanted[inside] = content[of_box]
        np.testing.assert_array_equal(tensor, wanted)


TESTED.update(
    (f"cp.async.bulk.tensor.{d}d.shared::cluster.global.mbarrier::complete_tx::bytes", None) for d in range(1, 6)
)
TESTED.update((f"cp.async.bulk.tensor.{d}d.global.shared::cta.tile.bulk_group", None) for d in range(1, 6))


FIELDS = (
    "global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
    "interleave_layout", "swizzle_mode", "fill_mode",
)  # fmt: skip


@about(COPY_OF_MAP)
@pytest.mark.parametrize(("shape", "box", "corners", "dtype", "swizzle"), CASES)
def test_tensor_map_that_the_program_makes(shape, box, corners, dtype, swizzle) -> None:
    """It is used as one that the driver makes."""
    tensor, map_made = padded(shape, dtype), aligned(128, np.uint8)
    tensor[...] = np.arange(1, tensor.size + 1).reshape(shape)
    count = int(np.prod(box)) * tensor.itemsize
    corner, found, end = corners[-1], np.zeros(count, np.uint8), max(count, 128)
    at = ", ".join(map(str, corner))
    body = f"""
        {barrier_at(end)} setp.eq.u32 %q3, %w, 0;
        {zeroed_map("%q3")} {fields_of_map(tensor, box[::-1], swizzle, "%s", "%p0", "%q80")} bar.warp.sync -1;
        @%q3 {COPY_OF_MAP} [%p1], [%s], 0x80;
        @%q3 fence.proxy.tensormap::generic.acquire.gpu [%p1], 128; fence.proxy.async; bar.sync 0;
        @%q80 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r80], {count};
        @%q80 cp.async.bulk.tensor.{len(shape)}d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%s], [%p1, {{{at}}}], [%r80];
        {wait(0, "wait")} {copy("%p2", "%s", count, 64, "out")}"""
    run(body, tensor, map_made, found, threads=64, shared=end + 16)
    wanted = np.zeros(box, dtype)
    inside, of_box = overlap(tensor, corner, box[::-1])
    wanted[of_box] = tensor[inside]
    np.testing.assert_array_equal(found, in_shared_memory(wanted, swizzle))


for field in FIELDS:
    size = 64 if field in ("global_address", "global_stride") else 32
    TESTED.add((f"tensormap.replace.tile.{field}.shared::cta.b1024.b{size}", None))


def test_tensor_map_that_is_the_first_parameter() -> None:
    """As __grid_constant__ gives it; its address, the offset among the parameters, is 0."""
    tensor, found = np.arange(16, dtype=np.int32).reshape(2, 8), aligned((2, 8), np.int32)
    text = """
        .version 8.7
        .target sm_90a
        .address_size 64
        .visible .entry kernel(.param .align 64 .b8 map[128], .param .u64 to)
        {
            .reg .pred %p<2>;
            .reg .b32 %r<2>;
            .reg .b64 %rd<3>;
            .shared .align 128 .b8 memory[128];
            mov.b64 %rd1, map;
            ld.param.u64 %rd2, [to];
            mov.u32 %r1, memory;
            mbarrier.init.shared::cta.b64 [%r1+64], 1;
            fence.mbarrier_init.release.cluster;
            mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+64], 64;
            cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {0, 0}], [%r1+64];
            wait: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1+64], 0;
            @!%p1 bra wait;
            cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r1], 64;
            cp.async.bulk.commit_group;
            cp.async.bulk.wait_group 0;
            ret;
        }"""
    parameters = tensor_map(tensor, (8, 2), 0).tobytes() + found.ctypes.data.to_bytes(8, "little")
    memory = memory_of([torch.from_numpy(tensor), torch.from_numpy(found)])
    Kernel(text).launch([1], [1], 0, parameters, memory)
    np.testing.assert_array_equal(found, tensor)
