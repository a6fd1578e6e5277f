"""The emulator's conversions of floating point numbers, against exact arithmetic on fractions.

Definitions are written from the text of the PTX ISA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from emulated_ptx import (
    PRECISION,
    TESTED,
    Case,
    check,
    decode,
    each,
    encode,
    execute,
    flushed,
    is_nan,
    nearest,
    rows_of,
    width,
)

HALVES = ("bf16", "f16")


def towards(rounding: str) -> Callable[[Fraction], int]:
    return {"rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil, "rni": round}[rounding]


def to_integer(rounding: str, to: str, source: str) -> Callable[[float], int]:
    """The nearest that there is. NaN: 0, or only the highest bit if one of the types has 64 bits."""
    sign, bits = to[0], width(to)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if sign == "s" else (0, (1 << bits) - 1)

    def result(x: float) -> int:
        if math.isnan(x):
            return 1 << bits - 1 if 64 in (bits, width(source)) else 0
        if math.isinf(x):
            return high if x > 0 else low
        return min(max(towards(rounding)(Fraction(x)), low), high)

    return result


ROUNDINGS = ("rzi", "rmi", "rpi", "rni")
TO_INTEGER = [
    Case(f"cvt.{r}.{to}.{source}", f"{to} {source}", to_integer(r, to, source))
    for r in ROUNDINGS
    for to in ("s32", "u32", "s64", "u64")
    for source in ("f32", "f64")
]
TIES = [
    -2.5,
    -1.5,
    -0.5,
    0.5,
    1.5,
    2.5,
    2.0**31,
    2.0**31 - 0.5,
    2.0**32,
    2.0**63,
    2.0**64,
    -(2.0**31),
    -(2.0**63),
    1e-40,
]


def halfway(kind: str) -> list[tuple[int, ...]]:
    return [(encode(x, kind),) for x in TIES]


@each(TO_INTEGER)
def test_float_to_integer(case) -> None:
    kind = case.types.split()[1]
    numbers = [row for row in rows_of([kind]) + halfway(kind) if not is_nan(row[0], kind)]
    check(case, numbers)


@each([c for c in TO_INTEGER if "rzi" in c.opcode])
def test_nan_to_integer(case) -> None:
    check(case, [(encode(math.nan, case.types.split()[1]),)])


@each([c._replace(opcode=c.opcode.replace("i.", "i.sat.")) for c in TO_INTEGER if "rzi" in c.opcode])
def test_saturating_float_to_integer(case) -> None:
    kind = case.types.split()[1]
    check(case, [row for row in halfway(kind) if not is_nan(row[0], kind)])


@each(
    [
        Case(f"cvt.{r}.ftz.{to}.f32", f"{to} f32", lambda x, r=r, to=to: to_integer(r, to, "f32")(flushed(x)))
        for r in ROUNDINGS
        for to in ("s32", "u32", "s64", "u64")
    ]
)
def test_float_to_integer_flushes_denormal_numbers(case) -> None:
    check(case, [*rows_of(["f32"]), *halfway("f32")])


def rounded(rounding: str) -> Callable[[float], float]:
    """To an integer that stays a floating point number, with the sign of what it came from."""

    def result(x: float) -> float:
        return x if not math.isfinite(x) else math.copysign(float(towards(rounding)(Fraction(x))), x)

    return result


def clamped(x: float) -> float:
    return 0.0 if math.isnan(x) else min(max(x, 0.0), 1.0)


@each([
    *[Case(f"cvt.{r}.f32.f32", "f32 f32", rounded(r)) for r in ROUNDINGS],
    *[Case(f"cvt.{r}.ftz.f32.f32", "f32 f32", lambda x, r=r: rounded(r)(flushed(x))) for r in ROUNDINGS],
    *[Case(f"cvt.rn.{t}.f32", f"{t} f32", lambda x: x) for t in HALVES],
    *[Case(f"cvt.{to}.{t}", f"{to} {t}", lambda x: x) for t in HALVES for to in ("f32", "f64")],
    Case("cvt.f64.f32", "f64 f32", lambda x: x),
    Case("cvt.rn.f32.f64", "f32 f64", lambda x: x),
    Case("cvt.sat.ftz.f32.f32", "f32 f32", lambda x: None if flushed(x) == 0 else clamped(x)),
    Case("cvt.sat.f32.f32", "f32 f32", lambda x: None if x == 0 else clamped(x)),  # which zero -0 gives is open
])  # fmt: skip
def test_float_to_float(case) -> None:
    """Also halfway between two numbers of the result, and right beside that."""
    to, source = case.types.split()
    digits = PRECISION[to][0]
    ties = [Fraction(2 * odd + 1, 2**digits) for odd in (2 ** (digits - 1), 2 ** (digits - 1) + 1)] + [
        Fraction(5, 2),
        Fraction(7, 2),
    ]
    beside = [t + d for t in ties for d in (0, Fraction(1, 2**22), -Fraction(1, 2**22))]
    check(case, rows_of([source]) + [(encode(x, source),) for x in beside] + [(encode(-x, source),) for x in beside])


@each([Case(f"cvt.rn.{t}x2.f32", t, nearest) for t in HALVES])
def test_float_to_pair(case) -> None:
    """The first operand becomes the upper half."""
    rows = rows_of(["f32", "f32"])
    found = execute(case.opcode, "b32", "f32 f32", list(zip(*rows, strict=True)))
    for (a, b), bits in zip(rows, found, strict=True):
        for source, half in ((a, bits >> 16), (b, bits & 0xFFFF)):
            number = decode(source, "f32")
            assert half == encode(number, case.types) or (math.isnan(number) and is_nan(half, case.types))


TESTED.update((f"cvt.rn.{t}x2.f32", 3) for t in HALVES)


@each([Case("cvt.rna.tf32.f32", "f32 f32", lambda x: x)])
def test_float_to_tf32(case) -> None:
    """11 digits; halfway cases go away from zero."""
    ties = [encode(1 + Fraction(k, 2**11), "f32") for k in range(8)]
    bits = [row[0] for row in rows_of(["f32"])] + ties + [x | 1 << 31 for x in ties]
    for x, result in zip(bits, execute(case.opcode, "b32", "f32", [bits]), strict=True):
        number = decode(x, "f32")
        if not math.isfinite(number):
            assert result == x or (is_nan(x, "f32") and is_nan(result, "f32"))
            continue
        exponent = max(math.frexp(number)[1] - 1, -126)
        step = Fraction(2) ** (exponent - 10)
        wanted = int(abs(Fraction(number)) / step + Fraction(1, 2)) * step
        found = decode(result & 0xFFFFE000, "f32")
        assert Fraction(abs(found)) == wanted if math.isfinite(found) else wanted >= 2**128, number
