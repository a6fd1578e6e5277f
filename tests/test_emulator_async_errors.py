"""What the emulator calls an error in asynchronous copies and matrix products.

Each faulty program has a twin without the fault, which passes; see Program.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulated_ptx import (
    COPY_OF_MAP,
    Program,
    aligned,
    barrier_at,
    check_program,
    each_program,
    fields_of_map,
    run,
    tensor_map,
    wait,
    with_tensor_memory,
    zeroed_map,
)
from emulator import Fault

LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
EXPECT = "@%q80 mbarrier.arrive.expect_tx.shared.b64 _, [%r80]"
ASYNC = """
        mul.lo.u32 %r1, %t, 16; add.u32 %r1, %r1, %s; xor.b32 %r2, %r1, 512;
        cp.async.cg.shared.global [%r1], [%e0], 16; cp.async.commit_group;"""
STORE = "@%q80 cp.async.bulk.global.shared::cta.bulk_group [%p0], [%s], 1024;"
FILL = """
        setp.eq.u32 %q80, %t, 0; mul.lo.u32 %r1, %t, 16; add.u32 %r1, %r1, %s;
        st.shared.v4.b32 [%r1], {%t, %t, %t, %t};"""
LOAD_BOX = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def tensor_and_map() -> list[np.ndarray]:
    tensor = aligned((8, 8), np.uint32)
    return [tensor, tensor_map(tensor, (4, 4), 0)]


def tensor_and_room() -> list[np.ndarray]:
    return [aligned((8, 8), np.uint32), aligned(128, np.uint8)]


# The first warp makes a map in shared memory and takes it to the second array.
ZEROED_MAP = zeroed_map("%q3")
FIELDS_OF_MAP = fields_of_map(tensor_and_room()[0], (4, 4), 0, "%s", "%p0", "%q80")
MAKE_MAP = f"setp.eq.u32 %q80, %t, 0; setp.eq.u32 %q3, %w, 0; {ZEROED_MAP} {FIELDS_OF_MAP}"
TAKE_MAP = f"bar.warp.sync -1; @%q3 {COPY_OF_MAP} [%p1], [%s], 128;"

COPIES = [
    Program("cp.async without a wait", f"""{ASYNC}
        cp.async.wait_group 0; //+
        ld.shared.b32 %r3, [%r1]; //!
        cp.async.wait_all;""", "read of shared memory that a cp.async is still writing"),
    Program("cp.async with a wait for too few groups", f"""{ASYNC}
        cp.async.wait_group 0; //+
        cp.async.wait_group 1; //-
        ld.shared.b32 %r3, [%r1]; //!
        cp.async.wait_all;""", "read of shared memory that a cp.async is still writing"),
    Program("cp.async of another warp", f"""{ASYNC}
        cp.async.wait_group 0; //!
        bar.sync 0; //+
        ld.shared.b32 %r3, [%r2]; //!""", "not ordered after the write of warp 0|still writing"),
    Program("write where a cp.async writes", f"""{ASYNC}
        cp.async.wait_group 0; //+
        st.shared.b32 [%r1], 1; //!
        cp.async.wait_all;""", "write to shared memory that a cp.async is still writing"),
    Program("bulk load without a wait", f"""
        {barrier_at(1024)} {EXPECT}, 1024;
        @%q80 {LOAD} [%s], [%p0], 1024, [%r80]; //!
        {wait(0, "again")} //+
        ld.shared.b32 %r1, [%s]; //!""", "not ordered after the write of a bulk load|that nobody has written"),
    Program("bulk load over what is still read", f"""
        {barrier_at(1024)} {FILL} bar.sync 0;
        ld.shared.b32 %r2, [%r1]; //!
        bar.sync 0; //+
        {EXPECT}, 1024;
        @%q80 {LOAD} [%s], [%p0], 1024, [%r80]; //- !
        @%q80 {LOAD} [%s], [%p0], 1024, [%r80]; //+
        {wait(0, "again")}""", "not ordered after the (read of warp 1|write of a bulk load)"),
    Program("mbarrier without init", """
        @%q80 mbarrier.init.shared.b64 [%s], 64; bar.sync 0; //-
        setp.eq.u32 %q80, %t, 0; @%q80 mbarrier.init.shared.b64 [%s], 64; bar.sync 0; //+
        mbarrier.arrive.shared.b64 _, [%s + 8]; //- !
        mbarrier.arrive.shared.b64 _, [%s]; //+""", "there is no mbarrier at 8"),
    Program("use of an mbarrier without a barrier after its init", """
        setp.eq.u32 %q80, %t, 0; @%q80 mbarrier.init.shared.b64 [%s], 64; //!
        bar.sync 0; //+
        mbarrier.arrive.shared.b64 _, [%s]; //!""", "not ordered after the write of warp 0|there is no mbarrier"),
    Program("mbarrier.inval while another warp may use it", f"""
        {barrier_at(1024, 64)} mbarrier.arrive.shared.b64 _, [%r80]; {wait(0, "again")} //!
        bar.sync 0; //+
        @%q80 mbarrier.inval.shared.b64 [%r80]; //!""", "not ordered after the (read|write) of warp"),
    Program("mbarrier of the block before", """
        mov.u32 %r1, %ctaid.x; setp.eq.u32 %q80, %t, 0;
        setp.eq.u32 %q1, %r1, 0; @!%q1 setp.eq.u32 %q80, %t, 99; //-
        @%q80 mbarrier.init.shared.b64 [%s], 64;
        bar.sync 0;
        mbarrier.arrive.shared.b64 _, [%s]; //!""", "there is no mbarrier at 0", blocks=2),
    Program("bulk load with an mbarrier that is not fenced", f"""
        setp.eq.u32 %q80, %t, 0; add.u32 %r80, %s, 1024; @%q80 mbarrier.init.shared.b64 [%r80], 1;
        fence.mbarrier_init.release.cluster; //+
        {EXPECT}, 1024;
        @%q80 {LOAD} [%s], [%p0], 1024, [%r80]; //- !
        @%q80 {LOAD} [%s], [%p0], 1024, [%r80]; //+
        bar.sync 0; {wait(0, "again")}""", "not ordered after its mbarrier.init"),
    Program("bulk load with an mbarrier that another warp makes", f"""
        setp.eq.u32 %q80, %t, 0; add.u32 %r80, %s, 1024; setp.eq.u32 %q1, %t, 32;
        @%q80 mbarrier.init.shared.b64 [%r80], 1;
        fence.mbarrier_init.release.cluster; //-
        bar.sync 0; //+
        @%q1 mbarrier.arrive.expect_tx.shared.b64 _, [%r80], 1024;
        @%q1 {LOAD} [%s], [%p0], 1024, [%r80]; //- !
        @%q1 {LOAD} [%s], [%p0], 1024, [%r80]; //+
        bar.sync 0; {wait(0, "again")}""", "not ordered after its mbarrier.init"),
    Program("too many arrivals", f"""
        {barrier_at(1024, 64)}
        mbarrier.arrive.shared.b64 _, [%r80]; //+
        mbarrier.arrive.shared.b64 _, [%r80], 3; //- !""", "mbarrier: 3 arrive where 1 are still awaited"),
    Program("misaligned bulk load", f"""
        {barrier_at(1024)} {EXPECT}, 16;
        @%q80 {LOAD} [%s], [%p0 + 16], 16, [%r80]; //+
        @%q80 {LOAD} [%s], [%p0 + 8], 16, [%r80]; //- !
        {wait(0, "again")}""", "bulk copy of 16 bytes, misaligned", arrays=lambda: [aligned((64, 4), np.uint32)]),
    Program("bulk load from outside", f"""
        {barrier_at(1024)} {EXPECT}, 32;
        @%q80 {LOAD} [%s], [%p0 + 4064], 32, [%r80]; //+
        @%q80 {LOAD} [%s], [%p0 + 4080], 32, [%r80]; //- !
        {wait(0, "again")}""", "in no tensor", arrays=lambda: [aligned((256, 4), np.uint32)]),
    Program("bulk store without a proxy fence", f"""{FILL} //!
        fence.proxy.async; //+
        bar.sync 0;
        {STORE} //- !
        {STORE} //+
        @%q80 cp.async.bulk.commit_group; @%q80 cp.async.bulk.wait_group 0;""", "without a fence.proxy.async"),
    Program("fence for another memory", f"""{FILL} //!
        fence.proxy.async.shared::cta; //+
        fence.proxy.async.global; //-
        bar.sync 0;
        {STORE} //- !
        {STORE} //+
        @%q80 cp.async.bulk.commit_group; @%q80 cp.async.bulk.wait_group 0;""", "without a fence.proxy.async"),
    Program("bulk store without a barrier", f"""{FILL} //!
        fence.proxy.async;
        bar.sync 0; //+
        {STORE} //- !
        {STORE} //+
        @%q80 cp.async.bulk.commit_group; @%q80 cp.async.bulk.wait_group 0; bar.sync 0;""",
        "not ordered after the (read|write)|that nobody has written"),
    Program("write over what a bulk store reads", f"""{FILL}
        fence.proxy.async; bar.sync 0; {STORE} //!
        @%q80 cp.async.bulk.commit_group;
        @%q80 cp.async.bulk.wait_group.read 0; //+
        @%q80 st.shared.b32 [%r1], 99; //!
        @%q80 cp.async.bulk.wait_group 0;""", "not ordered after the read of a bulk store of warp 0"),
    Program("read of what is being stored", f"""{FILL}
        fence.proxy.async; bar.sync 0;
        {STORE} //!
        @%q80 cp.async.bulk.commit_group;
        @%q80 cp.async.bulk.wait_group 0; //+
        @%q80 cp.async.bulk.wait_group.read 0; //-
        @%q80 ld.global.b32 %r2, [%p0]; //!
        @%q80 cp.async.bulk.wait_group 0;""",
        "read of global memory, not ordered after a write by a bulk store of warp 0"),
    Program("write over what a bulk load reads", f"""
        {barrier_at(1024)} {EXPECT}, 16;
        @%q80 {LOAD} [%s], [%p0], 16, [%r80]; //!
        {wait(0, "again")} //+
        @%q80 st.global.b32 [%p0], 9; //!
        {wait(0, "end")}""", "write to global memory, not ordered after a read by a bulk load"),
    Program("exit before a bulk store", f"""{FILL}
        fence.proxy.async; bar.sync 0; {STORE} @%q80 cp.async.bulk.commit_group;
        @%q80 cp.async.bulk.wait_group 0; //+
        mov.u32 %r1, 0;""", "the warp ends before its bulk stores"),
    Program("bulk load to a misaligned place", f"""
        {barrier_at(1024)} {EXPECT}, 16;
        @%q80 {LOAD} [%s + 16], [%p0], 16, [%r80]; //+
        @%q80 {LOAD} [%s + 8], [%p0], 16, [%r80]; //- !
        {wait(0, "again")}""", "misaligned shared address", arrays=lambda: [aligned((64, 4), np.uint32)]),
    Program("a tensor map that is none", f"""
        {barrier_at(1024)} {EXPECT}, 64;
        @%q80 {LOAD_BOX} [%s], [%p1, {{0, 0}}], [%r80]; //+
        @%q80 {LOAD_BOX} [%s], [%p0, {{0, 0}}], [%r80]; //- !
        {wait(0, "again")}""", "there is no tensor map at", arrays=tensor_and_map),
    Program("a box with too many dimensions", f"""
        {barrier_at(1024)} {EXPECT}, 64;
        @%q80 {LOAD_BOX} [%s], [%p1, {{0, 0}}], [%r80]; //+
        @%q80 {LOAD_BOX.replace("2d", "3d")} [%s], [%p1, {{0, 0, 0}}], [%r80]; //- !
        {wait(0, "again")}""", "another number of dimensions", arrays=tensor_and_map),
    Program("mbarrier.inval with a load on its way", f"""
        {barrier_at(1024)} {EXPECT}, 16;
        @%q80 {LOAD} [%s], [%p0], 16, [%r80];
        {wait(0, "again")} //+
        bar.sync 0;
        @%q80 mbarrier.inval.shared.b64 [%r80]; //!""", "mbarrier.inval while something is on its way"),
    Program("tensor map in memory that nobody has written", f"""
        setp.eq.u32 %q80, %t, 0; setp.eq.u32 %q3, %w, 0;
        {ZEROED_MAP} //+
        {FIELDS_OF_MAP} //!
        {TAKE_MAP}""", "that nobody has written", arrays=tensor_and_room),
    Program("stride of a tensor map", f"""{MAKE_MAP}
        @%q80 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%s], 0, 24; //-
        {TAKE_MAP} //!""", "the GPU does not accept this tensor map", arrays=tensor_and_room),
    Program("tensor map without a size", f"""{MAKE_MAP}
        @%q80 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%s], 1, 0; //-
        {TAKE_MAP} //!""", "the GPU does not accept this tensor map", arrays=tensor_and_room),
    Program("misaligned tensor map", f"""{MAKE_MAP} {TAKE_MAP}
        @%q80 tensormap.replace.tile.rank.shared::cta.b1024.b32 [%s], 1; //+
        @%q80 tensormap.replace.tile.rank.shared::cta.b1024.b32 [%s + 64], 1; //- !""",
        "tensor map at 64, which is misaligned", arrays=tensor_and_room),
    Program("tensor map with a type that is not emulated", f"""{MAKE_MAP}
        @%q80 tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%s], 11; //- !
        {TAKE_MAP}""", "of the type 11 are not emulated", arrays=tensor_and_room),
    Program("tensor map that another warp has not waited for", f"""{MAKE_MAP} {TAKE_MAP} //!
        bar.sync 0; //+
        setp.eq.u32 %q80, %t, 32; add.u32 %r80, %s, 1024; @%q80 mbarrier.init.shared.b64 [%r80], 1;
        @%q80 fence.mbarrier_init.release.cluster; {EXPECT}, 64;
        @%q80 {LOAD_BOX} [%s + 128], [%p1, {{0, 0}}], [%r80]; //!
        bar.sync 0; {wait(0, "again")}""", "not ordered after a write by another warp",
        arrays=tensor_and_room),
    Program("bulk load of what another block writes", f"""
        {barrier_at(1024)} {EXPECT}, 16; mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r1, 16, %p0;
        @%q80 st.global.b32 [%d1], %r1; //!
        bar.sync 0;
        @%q80 {LOAD} [%s], [%d1], 16, [%r80]; //+
        @%q80 {LOAD} [%s], [%p0], 16, [%r80]; //- !
        {wait(0, "again")}""", "read of global memory, not ordered after a write by another block", blocks=2),
    Program("bulk store to where another block stores", f"""{FILL}
        fence.proxy.async; bar.sync 0; mov.u32 %r1, %ctaid.x; mad.wide.u32 %d1, %r1, 1024, %p0;
        mov.b64 %d1, %p0; //-
        @%q80 cp.async.bulk.global.shared::cta.bulk_group [%d1], [%s], 1024; //!
        @%q80 cp.async.bulk.commit_group; @%q80 cp.async.bulk.wait_group 0;""",
        "write to global memory, not ordered after a write by another block", blocks=2),
    Program("a phase that is over two phases ago", f"""
        {barrier_at(1024)}
        setp.ne.u32 %q1, %w, 0; @%q1 bra other;
        @%q80 mbarrier.arrive.shared.b64 _, [%r80]; {wait(0, "first")}
        @%q80 mbarrier.arrive.shared.b64 _, [%r80]; {wait(1, "second")}
        bar.arrive 1, 64; bra done;
        other: mov.u32 %r1, 0;
        bar.sync 1, 64; //+
        {wait(1, "late")} //!
        done: mov.u32 %r1, 0;""", "two phases ahead", always=False),
]  # fmt: skip


@each_program(COPIES)
def test_asynchronous_copy(program) -> None:
    check_program(program)


# 64 x 8 products with A in %r20 to %r23 and B in shared memory, as core matrices without swizzle.
PRODUCT = """wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {%r10, %r11, %r12, %r13}, {%r20, %r21, %r22, %r23}, %d1, %q1, 1, 1, 0;"""
PRODUCT = " ".join(PRODUCT.split())
A, D, OTHER = "{%r20, %r21, %r22, %r23}", "{%r10, %r11, %r12, %r13}", "{%r30, %r31, %r32, %r33}"
WITH_ACCUMULATORS = PRODUCT.replace(D, OTHER).replace(A, D)
OVER_OPERAND = PRODUCT.replace(A, OTHER).replace(D, A)
OPERANDS = """
        mul.lo.u32 %r1, %t, 4; add.u32 %r1, %r1, %s;
        shr.u32 %r2, %s, 4; cvt.u64.u32 %d1, %r2; or.b64 %d1, %d1, 68720001024; setp.eq.u32 %q1, 0, 0;
        sub.u32 %r20, %t, %t; sub.u32 %r21, %t, %t; sub.u32 %r22, %t, %t; sub.u32 %r23, %t, %t;
        sub.u32 %r10, %t, %t; sub.u32 %r11, %t, %t; sub.u32 %r12, %t, %t; sub.u32 %r13, %t, %t;
        st.shared.b32 [%r1], %t;"""
READY = OPERANDS + " fence.proxy.async; bar.sync 0; wgmma.fence.sync.aligned;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
MATRICES = [
    Program("no proxy fence before wgmma", f"""{OPERANDS} //!
        fence.proxy.async.shared::cta; //+
        bar.sync 0; wgmma.fence.sync.aligned;
        {PRODUCT} //!
        {COMMIT} {WAIT}""", "the async proxy reads what warp . has written .*without a fence.proxy.async"),
    Program("no barrier before wgmma", f"""{OPERANDS} //!
        fence.proxy.async.shared::cta;
        bar.sync 0; //+
        wgmma.fence.sync.aligned;
        {PRODUCT} //!
        {COMMIT} {WAIT} bar.sync 0;""", "not ordered after the|nobody has written"),
    Program("no wgmma.fence", f"""{OPERANDS}
        fence.proxy.async.shared::cta; bar.sync 0;
        wgmma.fence.sync.aligned; //+
        {PRODUCT} //!
        {COMMIT} {WAIT}""", "register that was written after the last wgmma.fence"),
    Program("register written after wgmma.fence", f"""{READY}
        add.u32 %r22, %t, 5; //-
        {PRODUCT} //!
        {COMMIT} {WAIT}""", "register that was written after the last wgmma.fence"),
    Program("accumulator read too early", f"""{READY}
        {PRODUCT} {COMMIT}
        {WAIT} //+
        add.u32 %r30, %r12, 1; //!
        {WAIT}""", "read of an accumulator while its wgmma is in flight"),
    Program("accumulator copied too early", f"""{READY}
        {PRODUCT} {COMMIT}
        {WAIT} //+
        mov.u32 %r30, %r12; //!
        add.u32 %r30, %r30, 1;
        {WAIT}""", "read of an accumulator while its wgmma is in flight"),
    Program("accumulator read after a wait for too few groups", f"""{READY}
        {PRODUCT} {COMMIT}
        wgmma.wait_group.sync.aligned 1; //-
        wgmma.wait_group.sync.aligned 0; //+
        st.global.b32 [%e0], %r10; //!
        {WAIT}""", "read of an accumulator while its wgmma is in flight", arrays=lambda: [np.zeros(128, np.uint32)]),
    Program("accumulator written too early", f"""{READY}
        {PRODUCT} {COMMIT}
        {WAIT} //+
        mov.u32 %r13, 0; //!
        {WAIT}""", "write to a register while a wgmma that uses it is in flight"),
    Program("operand written too early", f"""{READY}
        {PRODUCT} {COMMIT}
        {WAIT} //+
        mov.u32 %r21, 0; //!
        {WAIT}""", "write to a register while a wgmma that uses it is in flight"),
    Program("accumulators as A of the next product", f"""{READY}
        {PRODUCT} {COMMIT}
        {WAIT} //+
        {WITH_ACCUMULATORS} //!
        {COMMIT} {WAIT}""", "wgmma with a register that a wgmma in flight uses to accumulate"),
    Program("A as accumulators of the next product", f"""{READY}
        {PRODUCT} {COMMIT}
        {WAIT} //+
        {OVER_OPERAND} //!
        {COMMIT} {WAIT}""", "wgmma with a register that a wgmma in flight uses as A"),
    Program("shared operand written too early", f"""{READY}
        {PRODUCT} //!
        {COMMIT}
        {WAIT} bar.sync 0; //+
        st.shared.b32 [%r1], 99; //!
        {WAIT}""", "write to shared memory, not ordered after the read of a matrix product of warp 0"),
    Program("exit before wgmma", f"""{READY}
        {PRODUCT} {COMMIT}
        {WAIT} //+
        mov.u32 %r1, 0;""", "the warp ends before its wgmma"),
    Program("exit before wgmma without a group", f"""{READY}
        {PRODUCT}
        {COMMIT} {WAIT} //+
        mov.u32 %r1, 0;""", "the warp ends before its wgmma"),
    Program("a matrix outside of shared memory", f"""{READY}
        add.s64 %d1, %d1, 256; //-
        {PRODUCT} //!
        {COMMIT} {WAIT}""", "shared read of 16 bytes at 4096 of 4096"),
]  # fmt: skip


@each_program([program._replace(threads=128) for program in MATRICES])
def test_matrix_product(program) -> None:
    check_program(program)


def test_copies_and_constants_behind_the_fence_are_allowed() -> None:
    """By the ISA they are not, but Triton leaves them there, and ptxas moves them or does without."""
    run(f"{READY} mov.b32 %r20, %r21; mov.b32 %r10, 0; {PRODUCT} {COMMIT} {WAIT}", threads=128, shared=4096)


def test_copies_of_accumulators_before_the_wait_are_made_behind_it() -> None:
    """Triton 3.6 emits them, and ptxas puts a wait before them."""
    found = np.zeros((128, 2), np.uint32)
    rest = "st.global.v2.b32 [%e0], {%r10, %r31};"
    run(f"{READY} {PRODUCT} {COMMIT} mov.b32 %r31, %r10; {WAIT} {rest}", found, threads=128, shared=4096)
    assert (found[:, 0] != 0xFFFFFFFF).all()
    np.testing.assert_array_equal(found[:, 0], found[:, 1])


# A in the first columns of tensor memory, the accumulators from column 64 on, and B as above.
MOVE = "{%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17}"
STORE_A = f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r71], {MOVE};"
LOAD_D = f"tcgen05.ld.sync.aligned.32x32b.x8.b32 {MOVE}, [%r71 + 64]; tcgen05.wait::ld.sync.aligned;"
TENSOR_READY = f"""{OPERANDS}
        or.b64 %d1, %d1, {1 << 46}; mov.pred %q2, 0;
        mov.u32 %r14, 0; mov.u32 %r15, 0; mov.u32 %r16, 0; mov.u32 %r17, 0;
        fence.proxy.async.shared::cta; {STORE_A} tcgen05.wait::st.sync.aligned; bar.sync 0;"""
TENSOR_PRODUCT = f"@%q80 tcgen05.mma.cta_group::1.kind::f16 [%r70 + 64], [%r70], %d1, {0x8020490}, %q2;"
TENSOR_COMMIT = "@%q80 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r80];"
TENSOR_MEMORY = [
    Program("columns that are not allocated", f"""
        mov.u32 %r90, 480; //+
        mov.u32 %r90, 512; //-
        add.u32 %r71, %r71, %r90;
        {STORE_A} //!
        tcgen05.wait::st.sync.aligned;""", "tensor memory at .*column 5"),
    Program("lanes of another warp", f"""
        mov.u32 %r71, %r70; //-
        {STORE_A} //!
        tcgen05.wait::st.sync.aligned;""", "this warp may not access the lanes of tensor memory"),
    Program("tensor memory that nobody has written", f"""
        {STORE_A} tcgen05.wait::st.sync.aligned; //+
        tcgen05.ld.sync.aligned.32x32b.x8.b32 {MOVE}, [%r71]; //!
        tcgen05.wait::ld.sync.aligned;""", "read of tensor memory that nobody has written"),
    Program("load before the store is done", f"""
        {STORE_A} //!
        tcgen05.wait::st.sync.aligned; //+
        tcgen05.ld.sync.aligned.32x32b.x8.b32 {MOVE}, [%r71]; //!
        tcgen05.wait::ld.sync.aligned; tcgen05.wait::st.sync.aligned;""", "without a tcgen05.wait::st"),
    Program("accumulators of a product in flight", f"""{TENSOR_READY}
        {TENSOR_PRODUCT} //!
        {TENSOR_COMMIT}
        {wait(0, "done")} //+
        {LOAD_D} //!
        {wait(0, "end")}""", "read of tensor memory, not ordered after the write of a matrix product of warp 0"),
    Program("operand of a product in flight", f"""{TENSOR_READY}
        {TENSOR_PRODUCT} //!
        {TENSOR_COMMIT}
        {wait(0, "done")} //+
        {STORE_A} //!
        {wait(0, "end")} tcgen05.wait::st.sync.aligned;""",
        "write to tensor memory, not ordered after a read of a matrix product"),
    Program("mbarrier.inval with products on their way", f"""{TENSOR_READY}
        add.u32 %r90, %r80, 16; @%q80 mbarrier.init.shared.b64 [%r90], 1; bar.sync 0;
        {TENSOR_PRODUCT} {TENSOR_COMMIT} {TENSOR_PRODUCT} {TENSOR_COMMIT.replace("%r80", "%r90")}
        {wait(0, "done").replace("%r80", "%r90")} //+
        @%q80 mbarrier.inval.shared.b64 [%r80]; //!
        {wait(0, "end").replace("%r80", "%r90")}""", "mbarrier.inval while something is on its way"),
    Program("product over what is being loaded", f"""{TENSOR_READY}
        tcgen05.st.sync.aligned.32x32b.x8.b32 [%r71 + 64], {MOVE}; tcgen05.wait::st.sync.aligned; bar.sync 0;
        tcgen05.ld.sync.aligned.32x32b.x8.b32 {MOVE}, [%r71 + 64]; //!
        tcgen05.wait::ld.sync.aligned; //+
        bar.sync 0;
        {TENSOR_PRODUCT} //!
        {TENSOR_COMMIT} {wait(0, "done")}""",
        "write to tensor memory, not ordered after a read of a tcgen05.ld of warp"),
    Program("shared operand of a product in flight", f"""{TENSOR_READY}
        {TENSOR_PRODUCT} //!
        {TENSOR_COMMIT}
        {wait(0, "done")} //+
        st.shared.b32 [%r1], 99; //!
        {wait(0, "end")}""", "write to shared memory, not ordered after the read of a matrix product of warp 0"),
]  # fmt: skip


@each_program([p._replace(threads=128, body=with_tensor_memory(p.body, 2048)) for p in TENSOR_MEMORY])
def test_tensor_memory(program) -> None:
    check_program(program)


GIVEN_BACK = [
    Program("another warp may still load", f"""
        {STORE_A} tcgen05.wait::st.sync.aligned;
        tcgen05.ld.sync.aligned.32x32b.x8.b32 {MOVE}, [%r71]; tcgen05.wait::ld.sync.aligned;
        bar.sync 0; //+""", "tensor memory at column 0 of 0"),
    Program("another warp has not waited for its loads", f"""
        {STORE_A} tcgen05.wait::st.sync.aligned;
        tcgen05.ld.sync.aligned.32x32b.x8.b32 {MOVE}, [%r71]; //!
        tcgen05.wait::ld.sync.aligned; //+
        bar.sync 0;""", "write to tensor memory, not ordered after a read of a tcgen05.ld of warp"),
]  # fmt: skip


@each_program(GIVEN_BACK)
def test_tensor_memory_is_given_back_too_early(program) -> None:
    body = with_tensor_memory(program.body, 2048)
    before, _, after = body.rpartition("bar.sync 0;")
    check_program(program._replace(threads=128, body=f"{before}\n{after}"))


def test_tensor_memory_has_to_be_given_back() -> None:
    body = with_tensor_memory("", 0)
    run(body, threads=128, shared=4096)
    with pytest.raises(Fault, match="without having given back tensor memory"):
        run(body[: body.rindex("@%q70 tcgen05.dealloc")], threads=128, shared=4096)


# ---- without checks
EARLY = [
    ("cp.async", f"{ASYNC} ld.shared.b32 %r10, [%r1]; cp.async.wait_all;"),
    ("bulk load", f"""{barrier_at(2048)} {EXPECT}, 1024;
        @%q80 {LOAD} [%s], [%p0], 1024, [%r80]; bar.sync 0; ld.shared.b32 %r10, [%s]; bar.sync 0; {wait(0, "end")}"""),
    ("wgmma", f"{READY} setp.ne.u32 %q1, 0, 0; {PRODUCT} {COMMIT} add.u32 %r30, %r10, 0; {WAIT} mov.u32 %r10, %r30;"),
    ("tcgen05.st", with_tensor_memory(f"""
        mov.u32 %r10, 0; {STORE_A} tcgen05.ld.sync.aligned.32x32b.x8.b32 {MOVE}, [%r71];
        tcgen05.wait::st.sync.aligned;""", 2048)),
    ("tcgen05.mma", with_tensor_memory(f"""{TENSOR_READY}
        {TENSOR_PRODUCT} {TENSOR_COMMIT} bar.sync 0; {LOAD_D} bar.sync 0; {wait(0, "end")}""", 2048)),
]  # fmt: skip


@pytest.mark.parametrize("body", [body for _, body in EARLY], ids=[name for name, _ in EARLY])
def test_results_are_poison_before_the_wait(body) -> None:
    """Also where the checks are left out: 0xffffffff is NaN in all formats."""
    source, found = aligned((128, 4), np.uint32), np.zeros(128, np.uint32)
    run(f"{body} st.global.b32 [%e1], %r10;", source, found, threads=128, shared=4096, checks=False)
    assert (found == 0xFFFFFFFF).all()
