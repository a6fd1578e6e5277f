"""What the emulator calls an error: in accesses to memory, of lanes and barriers, and in the text of a program.

Each faulty program has a twin without the fault, which passes; see Program.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulated_ptx import (
    Program,
    aligned,
    barrier_at,
    check_program,
    each_program,
    kernel_text,
    lines_of,
    run,
    wait,
)
from emulator import Fault, Kernel, Unsupported


def rows_of_a_view() -> list[np.ndarray]:
    return [aligned((64, 8), np.uint32)[:, :6]]


PLACES = [
    Program("read outside", """
        ld.global.b32 %r1, [%e0 + 4]; //+
        ld.global.b32 %r1, [%e0 + 4096]; //- !""", "global read of 4 bytes at .* in no tensor"),
    Program("write outside", """
        st.global.b32 [%e0], 0; //+
        st.global.b32 [%e0 + -4], 0; //- !""", "global write of 4 bytes at .* in no tensor"),
    Program("atomic outside", """
        red.global.add.u32 [%e0], 1; //+
        red.global.add.u32 [%e0 + 4096], 1; //- !""", "global write of 4 bytes at .* in no tensor"),
    Program("half of a vector outside", """
        setp.eq.u32 %q1, %i, 63;
        @%q1 ld.global.v2.b32 {%r1, %r2}, [%p0 + 4088]; //+
        @%q1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%p0 + 4096]; //- !""", "in no tensor"),
    Program("read between the rows", """
        ld.global.b64 %d1, [%e0 + 16]; //+
        ld.global.b64 %d1, [%e0 + 24]; //- !""",
        "global read of 8 bytes .*between the rows of a view", arrays=rows_of_a_view),
    Program("write between the rows", """
        st.global.b32 [%e0 + 20], 0; //+
        st.global.b32 [%e0 + 28], 0; //- !""",
        "global write of 4 bytes .*between the rows of a view", arrays=rows_of_a_view),
    Program("misaligned read", """
        ld.global.b32 %r1, [%e0 + 4]; //+
        ld.global.b32 %r1, [%e0 + 2]; //- !""", "4 bytes at .* misaligned"),
    Program("misaligned vector", """
        ld.global.v2.b32 {%r1, %r2}, [%e0 + 8]; //+
        ld.global.v2.b32 {%r1, %r2}, [%e0 + 4]; //- !""", "8 bytes at .* misaligned"),
    Program("misaligned write", """
        st.global.b64 [%e0], 0; //+
        st.global.b64 [%e0 + 4], 0; //- !""", "8 bytes at .* misaligned"),
    Program("misaligned atomic", """
        red.global.add.u32 [%e0], 1; //+
        red.global.add.u32 [%e0 + 2], 1; //- !""", "4 bytes at .* misaligned"),
    Program("shared memory outside", """
        st.shared.b32 [%s + 4092], 0; //+
        st.shared.b32 [%s + 4096], 0; //- !""", "shared write of 4 bytes at 4096 of 4096, outside"),
    Program("misaligned in shared memory", """
        st.shared.b64 [%s + 8], 0; //+
        st.shared.b64 [%s + 4], 0; //- !""", "shared write of 8 bytes .*misaligned"),
    Program("cp.async from outside", """
        mul.lo.u32 %r1, %t, 16; add.u32 %r1, %r1, %s;
        cp.async.cg.shared.global [%r1], [%e0], 16; //+
        cp.async.cg.shared.global [%r1], [%e0 + 4096], 16; //- !
        cp.async.wait_all;""", "in no tensor"),
    Program("misaligned cp.async", """
        mul.lo.u32 %r1, %t, 16; add.u32 %r1, %r1, %s;
        cp.async.cg.shared.global [%r1], [%e0], 16; //+
        cp.async.cg.shared.global [%r1], [%e0 + 8], 16; //- !
        cp.async.wait_all;""", "misaligned"),
    Program("indexed branch", """
        choices: .branchtargets one, two;
        mov.u32 %r1, 1; //+
        mov.u32 %r1, 2; //-
        brx.idx %r1, choices; //!
        one: two: mov.u32 %r1, 0;""", "label 2 of 2"),
    Program("trap", """
        setp.eq.u32 %q1, %t, 64; //+
        setp.eq.u32 %q1, %t, 40; //-
        @%q1 trap; //!""", "trap"),
]  # fmt: skip


@each_program(PLACES)
def test_access_outside_or_misaligned(program) -> None:
    check_program(program)


# %r1: a word of shared memory of this thread, %r2: of the thread with this number in the other warp
WORDS = """
        mul.lo.u32 %r1, %t, 4; xor.b32 %r2, %r1, 128; add.u32 %r1, %r1, %s; add.u32 %r2, %r2, %s;"""
SHARED_RACES = [
    Program("nobody has written", f"""{WORDS}
        st.shared.b32 [%r1], 0; //+
        ld.shared.b32 %r3, [%r1]; //!""", "read of shared memory that nobody has written"),
    Program("read after write", f"""{WORDS}
        st.shared.b32 [%r1], %t; //!
        bar.sync 0; //+
        ld.shared.b32 %r3, [%r2]; //!""", "read of shared memory, not ordered after the write of warp 0"),
    Program("write after read", f"""{WORDS}
        st.shared.b32 [%r1], %t; bar.sync 0;
        ld.shared.b32 %r3, [%r2]; //!
        bar.sync 0; //+
        st.shared.b32 [%r1], 7; //!""", "write to shared memory, not ordered after the read of warp 0"),
    Program("write after write", f"""{WORDS}
        st.shared.b32 [%r1], %t; //!
        bar.sync 0; //+
        st.shared.b32 [%r2], 99; //!""", "write to shared memory, not ordered after the write of warp 0"),
    Program("a barrier within warps is not enough", f"""{WORDS}
        st.shared.b32 [%r1], %t; //!
        bar.warp.sync -1; //-
        bar.sync 0; //+
        ld.shared.b32 %r3, [%r2]; //!""", "not ordered after the write of warp 0"),
    Program("an arrival orders what came before it", f"""{WORDS}
        setp.eq.u32 %q1, %w, 0; @%q1 bra first;
        bar.sync 1, 64;
        ld.shared.b32 %r3, [%r2]; //!
        bra done;
        first: mov.u32 %r4, 0;
        st.shared.b32 [%r1], %t; //+
        bar.arrive 1, 64;
        st.shared.b32 [%r1], %t; //- !
        done: mov.u32 %r4, 0;""", "not ordered after the|that nobody has written"),
    Program("an arrival without a wait", f"""
        {barrier_at(1024, 64)} {WORDS}
        st.shared.b32 [%r1], %t; //!
        mbarrier.arrive.shared.b64 _, [%r80];
        again: mbarrier.test_wait.parity.shared.b64 %q1, [%r80], 0; @!%q1 bra again; //+
        ld.shared.b32 %r3, [%r2]; //!""", "not ordered after the write of warp 0"),
    Program("ldmatrix", """
        mul.lo.u32 %r1, %t, 16; add.u32 %r1, %r1, %s; xor.b32 %r2, %r1, 512;
        st.shared.v4.b32 [%r1], {%t, %t, %t, %t}; //!
        bar.sync 0; //+
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r2]; //!""",
        "not ordered after the write of warp 0"),
]  # fmt: skip


@each_program(SHARED_RACES)
def test_race_in_shared_memory(program) -> None:
    check_program(program)


def test_same_value_written_twice_is_no_race() -> None:
    run("st.shared.b32 [%s], 5; st.global.b32 [%p0], 6;", np.zeros(1, np.uint32), threads=64, shared=4)


def test_checks_can_be_left_out() -> None:
    body = lines_of(SHARED_RACES[1].body, "+")
    run(body, threads=64, shared=4096, checks=False)


def test_atomic_and_plain_access_in_shared_memory() -> None:
    body = "setp.eq.u32 %q1, %t, 0; @%q1 st.shared.b32 [%s], 0; bar.sync 0; red.shared.add.u32 [%s], 1;"
    run(f"{body} bar.sync 0; ld.shared.b32 %r1, [%s];", threads=64, shared=4)
    with pytest.raises(Fault, match="not ordered"):
        run(f"{body} ld.shared.b32 %r1, [%s];", threads=64, shared=4)


ONE_PER_BLOCK = "setp.eq.u32 %q1, %t, 0; mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r1, 16, %p0;"
GLOBAL_RACES = [
    Program("read after write in a block", """
        xor.b32 %r1, %t, 32; mad.wide.u32 %d1, %r1, 16, %p0;
        st.global.b32 [%e0], %t; //!
        bar.sync 0; //+
        ld.global.b32 %r2, [%d1]; //!""", "read of global memory, not ordered after a write by another warp"),
    Program("write after read in a block", """
        xor.b32 %r1, %t, 32; mad.wide.u32 %d1, %r1, 16, %p0;
        ld.global.b32 %r2, [%e0]; //!
        bar.sync 0; //+
        st.global.b32 [%d1], 77; //!""", "write to global memory, not ordered after a read by another warp"),
    Program("write after write in a block", """
        xor.b32 %r1, %t, 32; mad.wide.u32 %d1, %r1, 16, %p0;
        st.global.b32 [%e0], 1; //!
        bar.sync 0; //+
        st.global.b32 [%d1], 2; //!""", "write to global memory, not ordered after a write by another warp"),
    Program("blocks that write the same word", f"""{ONE_PER_BLOCK}
        @%q1 st.global.b32 [%d1], %r1; //+
        @%q1 st.global.b32 [%p0], %r1; //- !""",
        "write to global memory, not ordered after a write by another block", blocks=3),
    Program("a block that reads what another writes", f"""{ONE_PER_BLOCK}
        @%q1 st.global.b32 [%d1], %r1; //!
        @%q1 ld.global.b32 %r2, [%d1]; //+
        @%q1 ld.global.b32 %r2, [%p0]; //- !""",
        "read of global memory, not ordered after a write by another block", blocks=3),
    Program("a block that writes what another reads", f"""{ONE_PER_BLOCK}
        @%q1 ld.global.b32 %r2, [%p0 + 16]; //!
        setp.eq.u32 %q1, %i, 64;
        @%q1 st.global.b32 [%d1 + 4], %r1; //+
        @%q1 st.global.b32 [%d1], %r1; //- !""",
        "write to global memory, not ordered after a read by another block", blocks=2),
    Program("an atomic and a plain write", f"""{ONE_PER_BLOCK}
        setp.eq.u32 %q2, %i, 0;
        @%q2 red.global.add.u32 [%p0], 1; //!
        setp.eq.u32 %q1, %i, 64;
        @%q1 atom.global.exch.b32 %r2, [%p0], 5; //+
        @%q1 st.global.b32 [%p0], 5; //- !""",
        "write to global memory, not ordered after a write by another block", blocks=2),
    Program("an atomic and a plain read", f"""{ONE_PER_BLOCK}
        setp.eq.u32 %q2, %i, 0;
        @%q2 red.global.add.u32 [%p0], 1; //!
        setp.eq.u32 %q1, %i, 64;
        @%q1 atom.global.or.b32 %r2, [%p0], 0; //+
        @%q1 ld.global.b32 %r2, [%p0]; //- !""",
        "read of global memory, not ordered after a write by another block", blocks=2),
    Program("a plain write and an atomic", f"""{ONE_PER_BLOCK}
        setp.eq.u32 %q2, %i, 0;
        @%q2 st.global.b32 [%p0 + 4], 5; //+
        @%q2 st.global.b32 [%p0], 5; //- !
        setp.eq.u32 %q1, %i, 64;
        @%q1 red.global.add.u32 [%p0], 1; //!""",
        "atomic on global memory, not ordered after a write by another block", blocks=2),
    Program("the same byte of a word", """
        setp.eq.u32 %q1, %l, 0; cvt.u64.u32 %d1, %w; add.s64 %d1, %d1, %p0;
        @%q1 st.global.b8 [%d1], %t; //+
        @%q1 st.global.b8 [%p0], %t; //- !""", "write to global memory, not ordered after a write by another warp"),
    Program("the same half of a word", """
        setp.eq.u32 %q1, %t, 0; mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r1, 2, %p0;
        @%q1 st.global.b16 [%d1], %r1; //+
        @%q1 st.global.b16 [%p0 + 2], %r1; //- !""",
        "write to global memory, not ordered after a write by another block", blocks=2),
]  # fmt: skip


@each_program(GLOBAL_RACES)
def test_race_in_global_memory(program) -> None:
    check_program(program)


HIDDEN = [
    Program("a read that another warp's read hides", """
        setp.eq.u32 %q1, %w, 0; setp.eq.u32 %q2, %w, 2;
        @!%q2 ld.global.b32 %r1, [%p0]; //!
        bar.sync 0; //+
        @!%q1 bar.sync 1, 64;
        @%q2 st.global.b32 [%p0], 5; //!""", "not ordered after a read by another warp", threads=96),
    Program("a byte that another warp's byte hides", """
        setp.eq.u32 %q1, %w, 0; setp.eq.u32 %q2, %w, 2;
        @%q1 st.global.b8 [%p0], 1; //!
        bar.sync 0; //+
        @!%q1 st.global.b8 [%p0 + 1], 2;
        @!%q1 bar.sync 1, 64;
        @%q2 st.global.b8 [%p0], 3; //!""", "not ordered after a write by another warp", threads=96),
    Program("a plain write that the block's own atomic hides", f"""{ONE_PER_BLOCK}
        setp.eq.u32 %q2, %i, 0;
        @%q2 st.global.b32 [%p0], 5; //!
        setp.eq.u32 %q2, %t, 32;
        bar.sync 0; //+
        mov.u32 %r2, 0; //-
        @%q2 red.global.add.u32 [%p0], 1; //!
        bar.sync 0;
        @%q1 red.global.add.u32 [%p0], 1;""", "atomic on global memory, not ordered after a write by another warp"),
    Program("the part of a word of shared memory that another warp still reads", """
        setp.eq.u32 %q1, %t, 32; @%q1 st.shared.b32 [%s], 1; bar.sync 0; setp.eq.u32 %q2, %t, 0;
        @%q2 ld.shared.b32 %r1, [%s]; //!
        bar.sync 0; //+
        @%q1 st.shared.b8 [%s + 3], 7; //!""", "write to shared memory, not ordered after the read of warp 0"),
    Program("bytes of a word that nobody has written", """
        setp.eq.u32 %q1, %t, 0; @%q1 st.shared.b8 [%s], 1; bar.sync 0;
        ld.shared.u8 %r1, [%s]; //+
        ld.shared.u8 %r1, [%s + 1]; //- !""", "read of shared memory that nobody has written"),
]  # fmt: skip


@each_program(HIDDEN)
def test_access_that_another_could_hide(program) -> None:
    check_program(program)


def test_different_bytes_of_a_word_of_shared_memory_are_no_race() -> None:
    run("setp.eq.u32 %q1, %l, 0; add.u32 %r1, %s, %w; @%q1 st.shared.b8 [%r1], %t;", threads=64, shared=4)


def test_own_atomic_does_not_hide_that_of_another_block() -> None:
    body = "setp.eq.u32 %q1, %t, 0; @%q1 red.global.add.u32 [%p0], 1; setp.eq.u32 %q1, %i, 32;"
    run(body, np.zeros(1, np.uint32), blocks=2)
    with pytest.raises(Fault, match="not ordered after a write by another block"):
        run(f"{body} @%q1 ld.global.b32 %r1, [%p0];", np.zeros(1, np.uint32), blocks=2)


LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
EXPECT = "@%q80 mbarrier.arrive.expect_tx.shared.b64 _, [%r80]"
SOME = "setp.lt.u32 %q1, %l, 16; mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0; mov.pred %q2, %q1;"
TOGETHER = [
    "bar.sync 0;",
    "bar.warp.sync -1;",
    "shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;",
    "vote.sync.any.pred %q3, %q2, -1;",
    "elect.sync %r1|%q3, -1;",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%s];",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%s], {%r1};",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, "
    "{%r1, %r2, %r3, %r4};",
    "wgmma.fence.sync.aligned;",
    "vote.sync.ballot.b32 %r1, %q2, -1;",
    "redux.sync.add.u32 %r1, %r2, -1;",
]  # fmt: skip


@pytest.mark.parametrize("statement", TOGETHER)
def test_lanes_are_missing(statement) -> None:
    """Half of a warp comes to an instruction that needs all of it."""
    body = f"{SOME} mul.lo.u32 %r5, %l, 4; add.u32 %r5, %r5, %s; st.shared.b32 [%r5], 0; bar.warp.sync -1;"
    run(f"{body}\n{statement}", shared=128)
    with pytest.raises(Fault, match=r"lanes 0000ffff of ffffffff come here, all have to .*PTX line 1\d,"):
        run(f"{body}\n@%q1 {statement}", shared=128)


def test_shuffle_from_a_lane_that_takes_no_part() -> None:
    run(f"{SOME} @%q1 shfl.sync.idx.b32 %r1, %r2, 15, 31, 0xffff;")
    with pytest.raises(Fault, match="shfl from lane 16, which does not take part"):
        run(f"{SOME} @%q1 shfl.sync.idx.b32 %r1, %r2, 16, 31, 0xffff;")


DEADLOCKS = [
    Program("barriers with different numbers", """
        bar.sync %w; //- !
        bar.sync 1; //+""", "deadlock: warp 0 waits at barrier 0 .*, warp 1 waits at barrier 1"),
    Program("a barrier of more threads than come", """
        bar.sync 1, 96; //- !
        bar.sync 1, 64; //+""", "deadlock: warp 0 waits at barrier 1"),
    Program("arrivals that do not come", f"""
        {barrier_at(1024, 64)}
        setp.lt.u32 %q1, %t, 60; //-
        setp.lt.u32 %q1, %t, 64; //+
        @%q1 mbarrier.arrive.shared.b64 _, [%r80];
        again: mbarrier.try_wait.parity.shared.b64 %q2, [%r80], 0; //!
        @!%q2 bra again;""", "deadlock: .*mbarrier at 1024 awaits 4 arrivals and 0 bytes in phase 0"),
    Program("bytes that do not come", f"""
        {barrier_at(1024)}
        {EXPECT}, 48; //-
        {EXPECT}, 32; //+
        @%q80 {LOAD} [%s], [%p0], 32, [%r80];
        again: mbarrier.try_wait.parity.shared.b64 %q2, [%r80], 0; //!
        @!%q2 bra again;""", "deadlock: .*mbarrier at 1024 awaits 0 arrivals and 16 bytes in phase 0"),
    Program("the parity of the next phase", f"""
        {barrier_at(1024, 64)} mbarrier.arrive.shared.b64 _, [%r80];
        {wait(0, "phase")} //+
        {wait(0, "phase")} {wait(1, "next")} //- !""", "deadlock"),
]  # fmt: skip


@each_program(DEADLOCKS)
def test_deadlock(program) -> None:
    check_program(program)


def test_barrier_of_fewer_threads_than_come() -> None:
    run("bar.sync 1, 64;", threads=64)
    with pytest.raises(Fault, match="barrier 1: 2 warps come where 1 are meant to"):
        run("bar.sync 1, 32;", threads=64)


# ---- what is refused before anything runs
REFUSED = [
    ("sad.u32 %r1, %r2, %r3, %r4;", "unknown form"),
    ("add.sat.s32 %r1, %r2, %r3;", "unknown form"),
    ("add.rz.f32 %r1, %r2, %r3;", "unknown form"),
    ("ld.local.b32 %r1, [%r2];", "unknown form"),
    ("add.u32 %r1, %r2;", "unknown form"),
    ("add.u32 %r1, %r2, %r3, %r4;", "unknown form"),
    ("add.u32 %r1, %d2, %r3;", "%d2 has 64 bits where 32 are meant"),
    ("add.u64 %d1, %d2, %r3;", "%r3 has 32 bits where 64 are meant"),
    ("cvt.rn.bf16.f32 %r1, %r2;", "%r1 has 32 bits where 16 are meant"),
    ("setp.eq.u32 %r1, %r2, %r3;", "%r1 has 32 bits where pred are meant"),
    ("ld.global.b64 %r1, [%d1];", "there is no ld.global.u64.32"),
    ("ld.global.v2.b32 {%r1, %d2}, [%d1];", "registers of several sizes"),
    ("ld.shared.b32 %r1, [somewhere];", "address"),
    ("mov.u32 %f1, 0;", "register %f1 is not declared"),
    ("mov.u64 %d1, %tid.x;", "%tid.x as a number of 64 bits"),
    ("add.u32 5, %r1, %r2;", "5 cannot be written"),
    ("bra nowhere;", "nowhere"),
    (".reg .b128 %v<4>;", ".reg .b128 %v<4>"),
    ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1, %r2, %r3, %r4}, %d1, %d2, %q1, -1, 1, 0, 0;", "negated"),
]  # fmt: skip


@pytest.mark.parametrize(("statement", "reason"), REFUSED)
def test_refused_with_line_and_statement(statement, reason) -> None:
    text = kernel_text(f"mov.u32 %r9, 0;\n{statement}")
    line = next(number for number, part in enumerate(text.split("\n"), 1) if part == statement)
    with pytest.raises(Unsupported) as caught:
        Kernel(text)
    message = str(caught.value)
    assert re.search(rf"\bline {line}\b", message) and reason in message
    assert statement.split()[0] in message
