"""The emulator's threads: branches, barriers, and instructions in which the lanes of a warp work together."""

from __future__ import annotations

import functools
import itertools
import operator
import random

import numpy as np
import pytest
from emulated_ptx import TESTED, about, aligned, decode, edges, encode, is_nan, run
from emulator import Kernel, Memory

LANES = range(32)


# ---- control
SPECIAL = [f"%{kind}.{axis}" for kind in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]


@about()
def test_special_registers() -> None:
    """Threads of a block are numbered with x fastest."""
    block, grid = (4, 3, 5), (2, 3, 2)
    threads, blocks = int(np.prod(block)), int(np.prod(grid))
    found = np.zeros((blocks, threads, len(SPECIAL)), np.uint32)
    lines = [f"mov.u32 %r9, {name}; st.global.b32 [%d1 + {4 * k}], %r9;" for k, name in enumerate(SPECIAL)]
    text = f"""
.visible .entry test(.param .u64 to)
{{
.reg .b32 %r<10>; .reg .b64 %d<3>;
mad.lo.u32 %r1, %ctaid.z, %nctaid.y, %ctaid.y; mad.lo.u32 %r1, %r1, %nctaid.x, %ctaid.x;
mad.lo.u32 %r2, %tid.z, %ntid.y, %tid.y; mad.lo.u32 %r2, %r2, %ntid.x, %tid.x;
mad.lo.u32 %r1, %r1, {threads}, %r2;
ld.param.u64 %d1, [to]; mad.wide.u32 %d1, %r1, {4 * len(SPECIAL)}, %d1;
{" ".join(lines)}
exit;
}}"""
    memory = [Memory(found.ctypes.data, found.ctypes.data + found.nbytes)]
    Kernel(text).launch(grid, block, 0, np.array([found.ctypes.data], np.uint64).tobytes(), memory)
    for b, t in itertools.product(range(blocks), range(threads)):
        z, y, x = np.unravel_index(t, block[::-1])
        block_z, block_y, block_x = np.unravel_index(b, grid[::-1])
        wanted = [x, y, z, *block, block_x, block_y, block_z, *grid, t % 32, t // 32]
        assert found[b, t].tolist() == wanted


@about("bra", "bra.uni", "setp.ge.u32")
def test_lanes_take_their_own_number_of_rounds() -> None:
    found = np.zeros(64, np.uint32)
    body = """
        mov.u32 %r1, 0; mov.u32 %r2, 0;
        again: setp.ge.u32 %q1, %r1, %t; @%q1 bra done;
        add.u32 %r1, %r1, 1; add.u32 %r2, %r2, %r1; bra.uni again;
        done: st.global.b32 [%e0], %r2;"""
    run(body, found, threads=64)
    assert found.tolist() == [k * (k + 1) // 2 for k in range(64)]


@about("brx.idx")
def test_indexed_branch() -> None:
    found = np.zeros(32, np.uint32)
    body = """
        and.b32 %r1, %l, 3; mov.u32 %r2, 0;
        choices: .branchtargets zero, one, two, one;
        brx.idx %r1, choices;
        two: add.u32 %r2, %r2, 100;
        one: add.u32 %r2, %r2, 10;
        zero: st.global.b32 [%e0], %r2;"""
    run(body, found)
    assert found.tolist() == [0, 10, 110, 10] * 8


def test_indexed_branch_of_some_lanes() -> None:
    """Those whose guard is false go on."""
    found = np.zeros(32, np.uint32)
    body = """
        setp.lt.u32 %q1, %l, 8; mov.u32 %r1, 0; mov.u32 %r2, 5;
        choices: .branchtargets end;
        @%q1 brx.idx %r1, choices;
        mov.u32 %r2, 7;
        end: st.global.b32 [%e0], %r2;"""
    run(body, found)
    assert found.tolist() == [5] * 8 + [7] * 24


@about("exit", "ret", "ret.uni", "trap", "bar.warp.sync")
def test_exit_of_some_lanes() -> None:
    """The rest goes on without them; a trap that no lane meets does nothing."""
    found = np.zeros(32, np.uint32)
    body = """
        setp.lt.u32 %q1, %l, 20; @!%q1 exit;
        setp.lt.u32 %q2, %l, 40; @!%q2 trap;
        bar.warp.sync -1; st.global.b32 [%e0], 1; ret.uni;"""
    run(body, found)
    assert found.tolist() == [1] * 20 + [0] * 12


@about("mov.b32", "mov.b64")
@pytest.mark.parametrize(("whole", "parts"), [(32, 2), (64, 2), (64, 4), (32, 4), (64, 8)])
def test_packing(whole, parts) -> None:
    """The first of a vector's registers holds the low bits."""
    part = whole // parts
    register = {8: "%c", 16: "%h", 32: "%r", 64: "%d"}
    source = np.random.default_rng(0).integers(0, 1 << whole, 32, np.uint64).astype(f"u{whole // 8}")
    swapped, last = np.zeros_like(source), np.zeros_like(source)
    names = [f"{register[part]}{k}" for k in range(parts)]
    body = f"""
        ld.global.b{whole} {register[whole]}9, [%e0];
        mov.b{whole} {{{", ".join(names)}}}, {register[whole]}9;
        mov.b{whole} {register[whole]}9, {{{", ".join(names[::-1])}}};
        st.global.b{whole} [%e1], {register[whole]}9;
        mov.b{whole} {{{", ".join(["_"] * (parts - 1) + [names[0]])}}}, {register[whole]}9;
        mov.b{whole} {register[whole]}9, {{{", ".join([names[0]] * parts)}}};
        st.global.b{whole} [%e2], {register[whole]}9;
        mov.b32 %r80, 1; mov.b64 %d80, 1;"""
    run(body, source, swapped, last)
    pieces, swapped, last = (array.view(f"u{part // 8}").reshape(32, parts) for array in (source, swapped, last))
    np.testing.assert_array_equal(swapped, pieces[:, ::-1])
    np.testing.assert_array_equal(last, pieces[:, :1].repeat(parts, 1))


HARMLESS = [
    "fence.acq_rel.gpu", "fence.sc.cta", "membar.gl", "membar.cta", "prefetch.global.L2 [%p0]",
    "griddepcontrol.wait", "griddepcontrol.launch_dependents", "setmaxnreg.inc.sync.aligned.u32 232",
    "createpolicy.fractional.L2::evict_first.b64 %d1, 1.0", "fence.proxy.tensormap::generic.acquire.gpu [%p0], 128",
    "discard.global.L2 [%p0], 128", "applypriority.global.L2::evict_normal [%p0], 128",
]  # fmt: skip


@pytest.mark.parametrize("statement", HARMLESS)
def test_hints_change_no_value(statement) -> None:
    found = np.zeros(32, np.uint32)
    run(f"mov.u32 %r1, %l; {statement}; st.global.b32 [%e0], %r1;", found)
    assert found.tolist() == list(LANES)


TESTED.update((statement.split()[0], None) for statement in HARMLESS)


# ---- barriers
@about("bar.sync")
@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_barrier_of_all_warps(schedule) -> None:
    """Every warp reads what the next one has written."""
    found = np.zeros(128, np.uint32)
    body = """
        mad.lo.u32 %r1, %t, 4, %s; st.shared.b32 [%r1], %t;
        bar.sync 0;
        add.u32 %r2, %t, 32; and.b32 %r2, %r2, 127; mad.lo.u32 %r2, %r2, 4, %s;
        ld.shared.b32 %r3, [%r2]; st.global.b32 [%e0], %r3;"""
    run(body, found, threads=128, shared=512, schedule=schedule)
    assert found.tolist() == [(t + 32) % 128 for t in range(128)]


@about("bar.sync", "bar.arrive", "bar.sync.aligned", "barrier.cta.sync", "barrier.cta.arrive")
@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
@pytest.mark.parametrize("prefix", ["bar", "barrier.cta"])
def test_producers_arrive_and_consumers_wait(prefix, schedule) -> None:
    """Two warps produce and go on, two others wait for all 128 threads. Barriers have numbers, also in registers."""
    found = np.zeros(128, np.uint32)
    body = f"""
        mov.u32 %r9, 5; bar.sync.aligned 5, 128; bar.sync %r9; barrier.cta.sync 6;
        barrier.cta.arrive 7, 256; bar.arrive 8, 256;
        setp.ge.u32 %q1, %w, 2; @%q1 bra consume;
        mad.lo.u32 %r1, %t, 4, %s; st.shared.b32 [%r1], %t; {prefix}.arrive 3, 128; bra done;
        consume: {prefix}.sync 3, 128;
        add.u32 %r2, %t, -64; mad.lo.u32 %r2, %r2, 4, %s; ld.shared.b32 %r3, [%r2];
        {prefix}.sync 4, 64; st.global.b32 [%e0], %r3;
        done: bar.sync 0; @!%q1 {prefix}.arrive 3, 128; @%q1 {prefix}.sync 3, 128;"""
    run(body, found, threads=128, shared=256, schedule=schedule)
    assert found.tolist() == [0] * 64 + list(range(64))


# ---- lanes together
def shuffled(mode: str, lane: int, by: int, control: int) -> tuple[int, bool]:
    """The lane that a value comes from, and whether it is in range, as the ISA's text has it."""
    bound, segment = control & 31, control >> 8 & 31
    highest, lowest = (lane & segment) | (bound & ~segment & 31), lane & segment
    by &= 31
    if mode == "up":
        source = lane - by
        inside = source >= highest
    elif mode == "down":
        source = lane + by
        inside = source <= highest
    elif mode == "bfly":
        source = lane ^ by
        inside = source <= highest
    else:
        source = lowest | (by & ~segment & 31)
        inside = source <= highest
    return (source if inside else lane), inside


@about(*(f"shfl.sync.{mode}.b32" for mode in ("up", "down", "bfly", "idx")))
def test_shuffles() -> None:
    """Whole warps, and segments of 16, 8 and 4 lanes, with and without clamping."""
    for mode, by, control in itertools.product(
        ("up", "down", "bfly", "idx"), (0, 1, 3, 16, 31, 33), (0x1F, 0, 0x101F, 0x1000, 0x181F, 0x1C03)
    ):
        value, found = np.arange(32, dtype=np.uint32) * 7 + 1, aligned((32, 2), np.uint32)
        body = f"""
            ld.global.b32 %r1, [%e0]; shfl.sync.{mode}.b32 %r1|%q1, %r1, {by}, {control}, -1;
            selp.b32 %r2, 1, 0, %q1; st.global.v2.b32 [%e1], {{%r1, %r2}};"""
        run(body, value, found)
        sources = [shuffled(mode, lane, by, control) for lane in LANES]
        wanted = [[value[source], inside] for source, inside in sources]
        assert found.tolist() == wanted, (mode, by, control)


@about("shfl.sync.idx.b32")
def test_shuffle_by_register_among_some_lanes() -> None:
    index = np.random.default_rng(0).integers(0, 16, 32).astype(np.uint32)
    found = np.full(32, 99, np.uint32)
    body = """
        ld.global.b32 %r1, [%e0]; setp.lt.u32 %q1, %l, 16;
        @%q1 shfl.sync.idx.b32 %r2, %l, %r1, 31, 0xffff; @%q1 st.global.b32 [%e1], %r2;"""
    run(body, index, found)
    assert found.tolist() == [*index[:16].tolist(), *[99] * 16]


REDUCTIONS = {
    f"redux.sync.{name}.{kind}": (operation, kind)
    for kinds, operations in (
        (("s32", "u32"), {"min": min, "max": max, "add": operator.add}),
        (("b32",), {"and": operator.and_, "or": operator.or_, "xor": operator.xor}),
    )
    for name, operation in operations.items()
    for kind in kinds
}
TESTED.update((opcode, 3) for opcode in REDUCTIONS)


@pytest.mark.parametrize("opcode", REDUCTIONS)
@pytest.mark.parametrize("lanes", [32, 13])
def test_reduction(opcode, lanes) -> None:
    operation, kind = REDUCTIONS[opcode]
    bits = (edges(kind) * 2)[:32]
    found = np.zeros(32, np.uint32)
    mask = (1 << lanes) - 1
    body = f"""
        ld.global.b32 %r1, [%e0]; setp.lt.u32 %q1, %l, {lanes};
        @%q1 {opcode} %r2, %r1, {mask}; @%q1 st.global.b32 [%e1], %r2;"""
    run(body, np.array(bits, np.uint32), found)
    wanted = encode(functools.reduce(operation, (decode(x, kind) for x in bits[:lanes])), kind)
    assert found.tolist() == [wanted] * lanes + [0] * (32 - lanes)


@about("redux.sync.min.f32", "redux.sync.max.f32")
@pytest.mark.parametrize("what", ["min", "max"])
def test_reduction_of_floats(what) -> None:
    """A number beats NaN; -0 is less than +0."""
    for sample in range(20):
        bits = random.Random(sample).choices(edges("f32"), k=32)
        if sample == 0:
            bits = [encode(float("nan"), "f32")] * 32
        if sample == 1:
            bits = [encode(float(x), "f32") for x in ("0.0", "-0.0")] * 16
        found = np.zeros(32, np.uint32)
        body = "ld.global.b32 %r1, [%e0]; redux.sync.max.f32 %r2, %r1, -1; redux.sync.min.f32 %r3, %r1, -1;"
        run(f"{body} st.global.b32 [%e1], %r{'3' if what == 'min' else '2'};", np.array(bits, np.uint32), found)
        numbers = [(decode(x, "f32"), 1 - (x >> 31), x) for x in bits if not is_nan(x, "f32")]
        wanted = {"min": min, "max": max}[what](numbers)[2] if numbers else None
        assert all(is_nan(x, "f32") if wanted is None else x == wanted for x in found.tolist())


@about("vote.sync.ballot.b32", "vote.sync.any.pred", "vote.sync.all.pred")
@pytest.mark.parametrize("mask", [0, 1, 0x80000000, 0x12345678, 0x0000FFFF, 0xFFFFFFFF])
def test_votes(mask) -> None:
    found = np.zeros((32, 3), np.uint32)
    body = f"""
        mov.u32 %r1, {mask}; shr.u32 %r1, %r1, %l; and.b32 %r1, %r1, 1; setp.ne.u32 %q1, %r1, 0;
        vote.sync.ballot.b32 %r2, %q1, -1; vote.sync.any.pred %q2, %q1, -1; vote.sync.all.pred %q3, %q1, -1;
        selp.b32 %r3, 1, 0, %q2; selp.b32 %r4, 1, 0, %q3;
        st.global.b32 [%e0], %r2; st.global.b32 [%e0 + 4], %r3; st.global.b32 [%e0 + 8], %r4;"""
    run(body, found)
    assert found.tolist() == [[mask, int(mask != 0), int(mask == 0xFFFFFFFF)]] * 32


@about("elect.sync")
@pytest.mark.parametrize("first", [0, 5, 31])
def test_one_lane_is_elected(first) -> None:
    """All living lanes get its number; the predicate is true for it alone."""
    found = np.full((32, 3), 99, np.uint32)
    body = f"""
        setp.lt.u32 %q9, %l, {first}; @%q9 exit;
        elect.sync %r1|%q1, -1; elect.sync _|%q2, -1;
        selp.b32 %r2, 1, 0, %q1; selp.b32 %r3, 1, 0, %q2;
        st.global.b32 [%e0], %r1; st.global.b32 [%e0 + 4], %r2; st.global.b32 [%e0 + 8], %r3;"""
    run(body, found)
    alive = found[first:]
    (leader,) = set(alive[:, 0].tolist())
    assert leader >= first and (found[:first] == 99).all()
    assert alive[:, 1].tolist() == alive[:, 2].tolist() == [int(k == leader) for k in range(first, 32)]
