"""The emulator's instructions on integers and predicates, lane by lane, against Python's integers.

Definitions are written from the text of the PTX ISA. Where it leaves a result open, a definition gives None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction

import pytest
from emulated_ptx import PRECISION, TESTED, Case, check, decode, each, encode, execute, rows_of, width

SIZES = (16, 32, 64)
INTEGERS = [f"{sign}{bits}" for bits in SIZES for sign in "su"]
WITH_BYTES = ["s8", "u8", *INTEGERS]


def quotient(a: int, b: int) -> int | None:
    """Towards zero; a division by zero, and one that overflows, has no defined result."""
    if b == 0:
        return None
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int | None:
    return None if b == 0 else a - quotient(a, b) * b


def bit_field(a: int, position: int, length: int, signed: bool) -> int:
    position, length = position & 255, length & 255
    sign = (a >> min(position + length - 1, 31)) & 1 if signed and length else 0
    bits = [(a >> (position + k)) & 1 if k < length and position + k <= 31 else sign for k in range(32)]
    return sum(bit << k for k, bit in enumerate(bits))


def insert(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for k in range(length):
        if position + k <= 31:
            b = b & ~(1 << (position + k)) | ((a >> k) & 1) << (position + k)
    return b


def permute(a: int, b: int, selector: int) -> int:
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    picked = []
    for k in range(4):
        choice = selector >> 4 * k & 15
        byte = source[choice & 7]
        picked.append((255 if byte & 128 else 0) if choice & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def logic(table: int) -> Callable[[int, int, int], int]:
    """Bit 4a + 2b + c of the table is the result for the bits a, b and c."""
    return lambda a, b, c: sum(
        (table >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k for k in range(32)
    )


def halfwords(operation: Callable[[int, int], int]) -> Callable[[int, int], int]:
    return lambda a, b: (operation(a & 0xFFFF, b & 0xFFFF) & 0xFFFF) | (operation(a >> 16, b >> 16) & 0xFFFF) << 16


def chosen(a: int, b: int, condition: int) -> int:
    return a if condition else b


COMPARE = {f: getattr(operator, f) for f in ("eq", "ne", "lt", "le", "gt", "ge")}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}

INTEGER = [
    *[
        Case(f"{name}.{t}", f"{t} {t} {t}", definition)
        for name, definition in {
            "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max,
            "div": quotient, "rem": remainder,
        }.items()
        for t in INTEGERS
    ],
    *[Case(f"mad.lo.{t}", f"{t} {t} {t} {t}", lambda a, b, c: a * b + c) for t in INTEGERS],
    *[Case(f"mul.hi.{t}", f"{t} {t} {t}", lambda a, b, n=n: a * b >> n) for n in SIZES for t in (f"s{n}", f"u{n}")],
    *[
        case
        for n in (16, 32)
        for narrow, wide in ((f"s{n}", f"s{2 * n}"), (f"u{n}", f"u{2 * n}"))
        for case in (
            Case(f"mul.wide.{narrow}", f"{wide} {narrow} {narrow}", operator.mul),
            Case(f"mad.wide.{narrow}", f"{wide} {narrow} {narrow} {wide}", lambda a, b, c: a * b + c),
        )
    ],
    *[
        Case(f"{name}.b{n}", f"b{n} b{n} b{n}", definition)
        for name, definition in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor))
        for n in SIZES
    ],
    *[Case(f"not.b{n}", f"b{n} b{n}", operator.invert) for n in SIZES],
    *[Case(f"neg.s{n}", f"s{n} s{n}", operator.neg) for n in SIZES],
    *[Case(f"abs.s{n}", f"s{n} s{n}", abs) for n in SIZES],
    *[Case(f"shl.b{n}", f"b{n} b{n} shift", lambda a, by, n=n: a << min(by, n)) for n in SIZES],
    *[Case(f"shr.{k}{n}", f"{k}{n} {k}{n} shift", lambda a, by, n=n: a >> min(by, n)) for n in SIZES for k in "sub"],
    Case("bfe.u32", "u32 u32 shift shift", lambda a, b, c: bit_field(a, b, c, False)),
    Case("bfe.s32", "s32 s32 shift shift", lambda a, b, c: bit_field(a, b, c, True)),
    Case("bfi.b32", "b32 b32 b32 shift shift", insert),
    *[Case("lop3.b32", "b32 b32 b32 b32", logic(t), str(t)) for t in (0x00, 0x01, 0x80, 0x96, 0xCA, 0xE8, 0xF0)],
    *[Case(f"popc.b{n}", f"u32 b{n}", lambda a: bin(a).count("1")) for n in (32, 64)],
    Case("clz.b32", "u32 b32", lambda a: 32 - a.bit_length()),
    Case("brev.b32", "b32 b32", lambda a: int(f"{a:032b}"[::-1], 2)),
    Case("prmt.b32", "b32 b32 b32 b32", permute),
    Case("shf.l.wrap.b32", "b32 b32 b32 shift", lambda a, b, by: (b << 32 | a) << (by & 31) >> 32),
    Case("shf.r.wrap.b32", "b32 b32 b32 shift", lambda a, b, by: (b << 32 | a) >> (by & 31)),
    *[Case(f"add.{k}16x2", "b32 b32 b32", halfwords(operator.add)) for k in "su"],
    *[Case(f"sub.{k}16x2", "b32 b32 b32", halfwords(operator.sub)) for k in "su"],
    # comparisons and choices
    *[Case(f"setp.{f}.{t}", f"pred {t} {t}", d) for f, d in COMPARE.items() for t in INTEGERS],
    *[Case(f"setp.{f}.b{n}", f"pred b{n} b{n}", COMPARE[f]) for f in ("eq", "ne") for n in SIZES],
    *[Case(f"setp.{f}.u{n}", f"pred u{n} u{n}", d) for f, d in UNSIGNED.items() for n in SIZES],
    *[Case(f"selp.{k}{n}", f"b{n} b{n} b{n} pred", chosen) for n in SIZES for k in "bsu"],
    *[Case(f"selp.f{n}", f"b{n} b{n} b{n} pred", chosen) for n in (32, 64)],
    Case("and.pred", "pred pred pred", operator.and_),
    Case("or.pred", "pred pred pred", operator.or_),
    Case("xor.pred", "pred pred pred", operator.xor),
    Case("mov.pred", "pred pred", lambda a: a),
    Case("not.pred", "pred pred", lambda a: 1 - a),
    *[Case(f"mov.{k}{n}", f"b{n} b{n}", lambda a: a) for n in SIZES for k in "bsu"],
    *[Case(f"mov.f{n}", f"b{n} b{n}", lambda a: a) for n in (32, 64)],
    *[Case(f"cvta.{to}global.u64", "b64 b64", lambda a: a) for to in ("", "to.")],
]  # fmt: skip


@each(INTEGER)
def test_integers(case) -> None:
    check(case)


@pytest.mark.parametrize("source", WITH_BYTES)
@pytest.mark.parametrize("to", WITH_BYTES)
def test_integer_conversion(to, source) -> None:
    """The low bits count of a register that is wider than the type, and a wider result is extended as its type says."""
    for from_bits in (n for n in SIZES if n >= width(source)):
        for to_bits in (n for n in SIZES if n >= width(to)):
            rows = rows_of([f"b{from_bits}"])
            found = execute(f"cvt.{to}.{source}", f"b{to_bits}", f"b{from_bits}", [[a for (a,) in rows]])
            for (a,), bits in zip(rows, found, strict=True):
                number = decode(a & ((1 << width(source)) - 1), source)
                wanted = decode(number & ((1 << width(to)) - 1), to) & ((1 << to_bits) - 1)
                assert bits == wanted, f"cvt.{to}.{source} of {a:x}: {from_bits} to {to_bits} bits"


TESTED.update((f"cvt.{to}.{source}", 2) for to in WITH_BYTES for source in WITH_BYTES)


@each([Case(f"cvt.rn.{f}.{t}", f"{f} {t}", Fraction) for f in ("f32", "f64") for t in WITH_BYTES])
def test_integer_to_float(case) -> None:
    """Rounded to nearest even. Of a register that is wider than the type, the low bits count."""
    result, source = case.types.split()
    bits, digits = width(source), PRECISION[result][0]
    ties = [(1 << digits) + 1, (1 << digits) + 3, (1 << digits + 1) + 3, (1 << digits + 2) + 5]  # halfway, and near it
    rows = rows_of([source]) + [(x,) for x in ties if x < 1 << (bits - 1)]
    for register in (n for n in SIZES if n >= bits):
        above = 0x5A5A5A5A5A5A5A5A >> bits << bits & ((1 << register) - 1)
        found = execute(case.opcode, result, f"b{register}", [[x | above for (x,) in rows]])
        for (x,), number in zip(rows, found, strict=True):
            assert number == encode(Fraction(decode(x, source)), result), (case.opcode, register, x)
