"""The emulator's loads, stores and atomics, in all sizes and spaces, against numpy."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from emulated_ptx import TESTED, about, aligned, edges, run, width
from emulator import Kernel, Memory

SIZES = (8, 16, 32, 64)
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
REGISTER = {16: "%h", 32: "%r", 64: "%d"}
LOAD_FROM = ["ld.global", "ld.global.nc", "ld.global.nc.L1::no_allocate", "ld.relaxed.gpu.global", "ld.volatile.global"]
STORE_TO = ["st.global", "st.global.wb", "st.relaxed.gpu.global", "st.release.sys.global", "st.volatile.global"]


def words(dtype: type, *shape: int, seed: int = 0) -> np.ndarray:
    """Any bits, at an address that suits every vector."""
    array = aligned(shape, dtype)
    raw = array.view(np.uint8)
    raw[...] = np.random.default_rng(seed).integers(0, 256, raw.shape, np.uint8)
    return array


def extended(values: np.ndarray, kind: str, bits: int) -> np.ndarray:
    """What a register of so many bits holds of values of a type."""
    size = width(kind) // 8
    typed = values.view(f"i{size}" if kind[0] == "s" else f"u{size}")
    return typed.astype(f"i{bits // 8}" if kind[0] == "s" else f"u{bits // 8}").view(UNSIGNED[bits])


LOADS = [(f"{sign}{bits}", to) for bits in SIZES for sign in "bsu" for to in (16, 32, 64) if to >= bits]
LOADS += [("f32", 32), ("f64", 64)]


@pytest.mark.parametrize("load", LOAD_FROM)
@pytest.mark.parametrize(("kind", "to"), LOADS)
def test_load_from_global_memory(kind, to, load) -> None:
    """A register that is wider than the type is filled up with zeros, or with the sign of an s type."""
    source, found, register = words(UNSIGNED[width(kind)], 64), np.zeros(64, UNSIGNED[to]), REGISTER[to] + "1"
    run(f"{load}.{kind} {register}, [%e0]; st.global.b{to} [%e1], {register};", source, found, threads=64)
    np.testing.assert_array_equal(found, extended(source, kind, to))


@pytest.mark.parametrize(("kind", "to"), LOADS)
def test_shared_memory(kind, to) -> None:
    """As in global memory, and there by a store of the low bits of a register."""
    size, register = width(kind) // 8, REGISTER[to] + "1"
    source, found = words(UNSIGNED[to], 64), np.zeros(64, UNSIGNED[to])
    body = f"""
        mad.lo.u32 %r80, %t, {size}, %s; ld.global.b{to} {register}, [%e0];
        st.shared.{kind} [%r80], {register}; ld.shared.{kind} {register}, [%r80];
        st.global.b{to} [%e1], {register};"""
    run(body, source, found, threads=64, shared=64 * size)
    np.testing.assert_array_equal(found, extended(source.astype(UNSIGNED[width(kind)]), kind, to))


@pytest.mark.parametrize(("kind", "to"), LOADS)
def test_parameter_memory(kind, to) -> None:
    register = {16: ".reg .b16 %h<2>;", 32: ".reg .b32 %r<2>;", 64: ""}[to] + " .reg .b64 %d<9>;"
    text = f"""
.visible .entry test(.param .u64 to, .param .align 8 .b8 block[16])
{{
{register}
ld.param.u64 %d2, [to]; ld.param.{kind} {REGISTER[to]}1, [block + 8]; st.global.b{to} [%d2], {REGISTER[to]}1; ret;
}}"""
    for seed in range(4):
        source, found = words(np.uint64, 1, seed=seed), np.zeros(1, UNSIGNED[to])
        packed = np.array([found.ctypes.data, 0, source[0]], np.uint64).tobytes()
        Kernel(text).launch([1], [1], 0, packed, [Memory(found.ctypes.data, found.ctypes.data + found.nbytes)])
        assert found[0] == extended(source.astype(UNSIGNED[width(kind)]), kind, to)[0]


@pytest.mark.parametrize("kind", ["b8", "u16", "s32", "b64"])
@pytest.mark.parametrize("store", STORE_TO)
def test_store_to_global_memory(kind, store) -> None:
    """The low bits of the register are stored."""
    source, found = words(np.uint64, 64), np.zeros(64, UNSIGNED[width(kind)])
    run(f"ld.global.b64 %d1, [%e0]; {store}.{kind} [%e1], %d1;", source, found, threads=64)
    np.testing.assert_array_equal(found, source.astype(found.dtype))


VECTORS = [
    (count, bits, space)
    for count in (2, 4, 8)
    for bits in SIZES
    for space, most in (("global", 256), ("shared", 128))
    if count * bits <= most
]


@pytest.mark.parametrize(("count", "bits", "space"), VECTORS)
def test_vectors(count, bits, space) -> None:
    """The first register has the element at the lowest address; an element whose register is _ is left out."""
    source, found = words(UNSIGNED[bits], 64, count), aligned((64, count), UNSIGNED[bits])
    register = REGISTER[max(bits, 16)]
    registers = [f"{register}{k}" for k in range(count)]
    backwards = ", ".join(registers[::-1])
    size = count * bits // 8
    if space == "global":
        body = f"ld.global.v{count}.b{bits} {{{', '.join(registers)}}}, [%e0];"
        body += f"st.global.v{count}.b{bits} [%e1], {{{backwards}}};"
    else:
        body = f"""
            mad.lo.u32 %r90, %t, {size}, %s;
            ld.global.v{count}.b{bits} {{{", ".join(registers)}}}, [%e0];
            st.shared.v{count}.b{bits} [%r90], {{{", ".join(registers)}}};
            ld.shared.v{count}.b{bits} {{{backwards}}}, [%r90];
            st.global.v{count}.b{bits} [%e1], {{{", ".join(registers)}}};"""
    run(body, source, found, threads=64, shared=64 * size)
    np.testing.assert_array_equal(found, source[:, ::-1])


@about("ld.global.v4.b32")
def test_vector_with_a_hole() -> None:
    source, found = words(np.uint32, 32, 4), np.zeros(32, np.uint32)
    run("ld.global.v4.b32 {_, _, %r1, _}, [%e0]; st.global.b32 [%e1], %r1;", source, found)
    np.testing.assert_array_equal(found, source[:, 2])


@about("ld.global.L1::evict_first.L2::cache_hint.b32", "createpolicy.fractional.L2::evict_last.b64")
def test_cache_policy_changes_nothing() -> None:
    source, found = words(np.uint32, 32), np.zeros(32, np.uint32)
    body = """
        createpolicy.fractional.L2::evict_last.b64 %d1, 1.0;
        ld.global.L1::evict_first.L2::cache_hint.b32 %r1, [%e0 + 0], %d1;
        st.global.b32 [%e1 + 0], %r1;"""
    run(body, source, found)
    np.testing.assert_array_equal(found, source)


@about("ld.shared.s8", "st.shared.b8", "ld.shared::cta.u16", "st.shared::cta.b16", "ld.shared.b64")
def test_shared_memory_in_all_sizes() -> None:
    """Each thread writes eight bytes in parts, and reads them in others. Offsets may be negative."""
    source, found, signs = words(np.uint64, 64), np.zeros(64, np.uint64), np.zeros(64, np.int64)
    body = """
        mad.lo.u32 %r1, %t, 8, %s; ld.global.b64 %d1, [%e0];
        mov.b64 {%r2, %r3}, %d1; mov.b32 {%h1, %h2}, %r2;
        shr.u32 %r4, %r3, 8; shr.u32 %r5, %r3, 16; shr.u32 %r6, %r3, 24;
        st.shared::cta.b16 [%r1], %h1; st.shared::cta.b16 [%r1 + 2], %h2;
        st.shared.b8 [%r1 + 4], %r3; st.shared.b8 [%r1 + 5], %r4;
        st.shared.b8 [%r1 + 6], %r5; add.u32 %r7, %r1, 8; st.shared.b8 [%r7 + -1], %r6;
        ld.shared.b64 %d2, [%r1]; st.global.b64 [%e1], %d2;
        ld.shared.s8 %d3, [%r1 + 7]; ld.shared::cta.u16 %d4, [%r1 + 2]; add.s64 %d3, %d3, %d4;
        st.global.b64 [%e2], %d3;"""
    run(body, source, found, signs, threads=64, shared=512)
    np.testing.assert_array_equal(found, source)
    parts = source.view(np.int8).reshape(64, 8)[:, 7].astype(np.int64) + source.view(np.uint16).reshape(64, 4)[:, 1]
    np.testing.assert_array_equal(signs, parts)


STATIC_AND_DYNAMIC = """
.version 8.7
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry test(.param .u64 .ptr .align 4 to)
{
.reg .b32 %r<9>; .reg .b64 %d<9>;
.shared .align 4 .b8 first[20];
.shared .align 16 .b32 second[8];
ld.param.b64 %d1, [to];
mov.u32 %r1, %tid.x; mad.wide.u32 %d2, %r1, 12, %d1;
mov.u32 %r2, first; mov.u32 %r3, second; mov.b32 %r4, dynamic;
st.global.b32 [%d2], %r2; st.global.b32 [%d2+4], %r3; st.global.b32 [%d2+8], %r4;
st.shared.b32 [second], %r1; st.shared.b32 [dynamic+96], %r1;
ret;
}
"""


@about()
def test_static_and_dynamic_arrays_do_not_overlap() -> None:
    """Dynamic shared memory begins behind the static arrays, at its own alignment."""
    addresses = np.zeros(3, np.uint32)
    kernel = Kernel(STATIC_AND_DYNAMIC)
    pointer = np.array([addresses.ctypes.data], np.uint64).tobytes()
    memory = [Memory(addresses.ctypes.data, addresses.ctypes.data + 12)]
    kernel.launch([1], [1], 100, pointer, memory)
    first, second, dynamic = sorted(zip(addresses.tolist(), (20, 32, 100), strict=True))
    assert first[0] + first[1] <= second[0] and second[0] + second[1] <= dynamic[0]
    assert dynamic[1] == 100 and addresses[1] % 16 == 0 and addresses[2] % 16 == 0


PARAMETERS = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry test(
  .param .u8 byte, .param .s16 half, .param .f32 single, .param .b64 pointer, .param .align 64 .b8 block[96]
)
{
.reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<9>;
ld.param.b64 %d1, [pointer];
ld.param.u8 %h1, [byte]; cvt.u64.u16 %d2, %h1; st.global.b64 [%d1], %d2;
ld.param.s16 %r1, [half]; cvt.s64.s32 %d2, %r1; st.global.b64 [%d1 + 8], %d2;
ld.param.f32 %r2, [single]; cvt.u64.u32 %d2, %r2; st.global.b64 [%d1 + 16], %d2;
ld.param.v2.b32 {%r3, %r4}, [block + 8]; cvt.u64.u32 %d2, %r4; st.global.b64 [%d1 + 24], %d2;
mov.b64 %d3, block; add.s64 %d3, %d3, 80; ld.param.b64 %d2, [%d3]; st.global.b64 [%d1 + 32], %d2;
ret;
}
"""


@about()
def test_parameters() -> None:
    """Each lies at a multiple of its size, or of its alignment."""
    found = np.zeros(5, np.int64)
    kernel = Kernel(PARAMETERS)
    assert kernel.parameters == {"byte": (0, 1), "half": (2, 2), "single": (4, 4), "pointer": (8, 8), "block": (64, 96)}
    packed = np.zeros(160, np.uint8)
    packed[0] = 200
    packed[2:4].view(np.int16)[0] = -5
    packed[4:8].view(np.float32)[0] = 1.5
    packed[8:16].view(np.uint64)[0] = found.ctypes.data
    packed[64 + 12 : 64 + 16].view(np.uint32)[0] = 77
    packed[64 + 80 : 64 + 88].view(np.int64)[0] = -(1 << 40)
    kernel.launch([1], [1], 0, packed.tobytes(), [Memory(found.ctypes.data, found.ctypes.data + 40)])
    assert found.tolist() == [200, -5, 0x3FC00000, 77, -(1 << 40)]
    with pytest.raises(ValueError, match="160 bytes"):
        kernel.launch([1], [1], 0, packed[:-1].tobytes(), [])


TESTED.update((f"{op}.{space}.b32", 2) for op in ("ld", "st") for space in ("global", "shared", "param"))

# ---- atomics
FOLDS = {
    "add": operator.add,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "min": min,
    "max": max,
}
ATOMICS = [
    (f, f"{k}{n}") for f in ("add", "min", "max") for n in (32, 64) for k in "su" if (f, k, n) != ("add", "s", 64)
]
ATOMICS += [(f, f"b{n}") for f in ("and", "or", "xor") for n in (32, 64)]


def shared_twin(instruction: str, bits: int) -> str:
    """The same in shared memory: the first thread brings the word there and back."""
    return f"""
        setp.eq.u32 %q9, %t, 0;
        @%q9 ld.global.b{bits} {REGISTER[bits]}80, [%p1];
        @%q9 st.shared.b{bits} [%s], {REGISTER[bits]}80;
        bar.sync 0;
        {instruction}
        bar.sync 0;
        @%q9 ld.shared.b{bits} {REGISTER[bits]}80, [%s];
        @%q9 st.global.b{bits} [%p1], {REGISTER[bits]}80;"""


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("what", "kind"), ATOMICS)
def test_atomics(what, kind, space) -> None:
    """The word takes every lane's value, and each lane gets what was there before its own."""
    bits = width(kind)
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")
    some = np.array((edges(kind) * 4)[:64], UNSIGNED[bits])
    word, before = some[3:4].copy(), np.zeros(64, UNSIGNED[bits])
    start, register = int(word.view(dtype)[0]), REGISTER[bits]
    place = "%p1" if space == "global" else "%s"
    instruction = f"atom.{space}.{what}.{kind} {register}2, [{place}], {register}1;"
    body = f"ld.global.b{bits} {register}1, [%e0];"
    body += instruction if space == "global" else shared_twin(instruction, bits)
    run(f"{body} st.global.b{bits} [%e2], {register}2;", some, word, before, threads=64, shared=8)
    seen = []
    for value in some.view(dtype).tolist():
        seen.append(start)
        start = int(
            np.array(FOLDS[what](start, value) & ((1 << bits) - 1), np.uint64).astype(UNSIGNED[bits]).view(dtype)
        )
    assert before.view(dtype).tolist() == seen and word.view(dtype)[0] == start


TESTED.update((f"atom.{space}.{what}.{kind}", 3) for space in ("global", "shared") for what, kind in ATOMICS)


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomic_float_sum(kind, space) -> None:
    some = np.arange(64).astype(f"f{width(kind) // 8}") / 4
    word, register = np.ones(1, some.dtype), REGISTER[width(kind)]
    place = "%p1" if space == "global" else "%s"
    instruction = f"red.{space}.add.{kind} [{place}], {register}1;"
    body = f"ld.global.{kind} {register}1, [%e0];"
    body += instruction if space == "global" else shared_twin(instruction, width(kind))
    run(body, some, word, threads=64, shared=8)
    assert word[0] == 1 + 63 * 64 / 8


@about("red.relaxed.gpu.global.add.u32")
def test_reduction_by_many_blocks() -> None:
    word = np.zeros(1, np.uint32)
    run("red.relaxed.gpu.global.add.u32 [%p0], %i;", word, threads=64, blocks=10)
    assert word[0] == 639 * 640 // 2


@about("red.global.add.f32", "red.shared.add.f32")
def test_reductions_of_floats_are_atomics_too() -> None:
    word = np.zeros(1, np.float32)
    body = """
        st.shared.b32 [%s], 0; bar.sync 0; red.shared.add.f32 [%s], 0f40000000; bar.sync 0;
        ld.shared.b32 %r1, [%s]; red.global.add.f32 [%p0], %r1;"""
    run(body, word, threads=64, shared=4)
    assert word[0] == 2 * 64 * 64


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("bits", [32, 64])
def test_exchange(bits, space) -> None:
    """Each lane gets what was there before its own value."""
    some, word, before = words(UNSIGNED[bits], 64), np.array([7], UNSIGNED[bits]), np.zeros(64, UNSIGNED[bits])
    register, place = REGISTER[bits], "%p1" if space == "global" else "%s"
    instruction = f"atom.{space}.exch.b{bits} {register}2, [{place}], {register}1;"
    body = f"ld.global.b{bits} {register}1, [%e0];"
    body += instruction if space == "global" else shared_twin(instruction, bits)
    run(f"{body} st.global.b{bits} [%e2], {register}2;", some, word, before, threads=64, shared=8)
    assert sorted([*before.tolist(), int(word[0])]) == sorted([7, *some.tolist()])


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("bits", [32, 64])
def test_compare_and_swap(bits, space) -> None:
    """Lane k turns k into k + 1, one after the other, from the one on that meets the value that it wants."""
    word, before = np.array([5], UNSIGNED[bits]), np.zeros(64, UNSIGNED[bits])
    register, place = REGISTER[bits], "%p1" if space == "global" else "%s"
    instruction = f"atom.relaxed.gpu.{space}.cas.b{bits} {register}3, [{place}], {register}1, {register}2;"
    body = f"cvt.u{bits}.u32 {register}1, %t; add.u{bits} {register}2, {register}1, 1;"
    body += instruction if space == "global" else shared_twin(instruction, bits)
    unused = np.zeros(1, np.uint8)
    run(f"{body} st.global.b{bits} [%e2], {register}3;", unused, word, before, threads=64, shared=8)
    assert word[0] == 64 and before.tolist() == [5] * 5 + list(range(5, 64))


TESTED.update((f"atom.{space}.{what}.b32", None) for space in ("global", "shared") for what in ("exch", "cas"))


def test_shared_addresses_wrap() -> None:
    """Triton lets a register be negative where the constant makes up for it."""
    found = np.zeros(64, np.uint32)
    body = """
        mul.lo.u32 %r1, %t, 16; add.u32 %r1, %r1, %s; sub.u32 %r2, %r1, 4096;
        st.shared.v4.b32 [%r2 + 4096], {%t, %t, %t, %t};
        setp.eq.u32 %q80, %t, 0; sub.u32 %r3, %s, 4096; @%q80 mbarrier.init.shared.b64 [%r3 + 5120], 64; bar.sync 0;
        mbarrier.arrive.shared.b64 _, [%r3 + 5120];
        wait: mbarrier.try_wait.parity.shared.b64 %q1, [%r3 + 5120], 0; @!%q1 bra wait;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r2 + 4096];
        ld.shared.b32 %r5, [%r2 + 4096]; st.global.b32 [%e0], %r5;"""
    run(body, found, threads=64, shared=1032)
    np.testing.assert_array_equal(found, np.arange(64))
