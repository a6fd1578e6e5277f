"""The emulator's instructions on floating point numbers, lane by lane, against exact arithmetic on fractions.

Definitions are written from the text of the PTX ISA.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from emulated_ptx import (
    TESTED,
    Case,
    check,
    decode,
    each,
    edges,
    encode,
    execute,
    flushed,
    is_nan,
    nearest,
    rows_of,
    width,
)

HALVES = ("bf16", "f16")
COMPARE = {f: getattr(operator, f) for f in ("eq", "ne", "lt", "le", "gt", "ge")}


def exactly(operation: Callable) -> Callable:
    """Without any rounding, except where there is no fraction: infinities, NaN, and zeros, which have a sign."""

    def result(*numbers: float) -> float | Fraction:
        by_zero = operation is operator.truediv and numbers[-1] == 0
        if all(map(math.isfinite, numbers)) and not by_zero:
            exact = operation(*map(Fraction, numbers))
            if exact != 0:
                return exact
            if all(numbers):
                return 0.0  # the terms cancel
        with np.errstate(all="ignore"):
            return operation(*map(np.float64, numbers))

    return result


def with_flush(operation: Callable, kind: str = "f32") -> Callable:
    def result(*numbers: float) -> float:
        x = operation(*(flushed(x, kind) for x in numbers))
        if isinstance(x, Fraction):
            x = nearest(x, kind)
        return flushed(x, kind)

    return result


def fused(a, b, c):
    return c if math.isinf(c) and math.isfinite(a) and math.isfinite(b) else a * b + c


def least(*numbers: float) -> float:
    """Of the operands that are numbers; NaN if there is none. -0 is less than +0."""
    return min((x for x in numbers if not math.isnan(x)), key=lambda x: (x, math.copysign(1, x)), default=math.nan)


def greatest(*numbers: float) -> float:
    return max((x for x in numbers if not math.isnan(x)), key=lambda x: (x, math.copysign(1, x)), default=math.nan)


def or_nan(operation: Callable) -> Callable:
    return lambda *numbers: math.nan if any(map(math.isnan, numbers)) else operation(*numbers)


def root(x: float) -> float | Fraction:
    """To 100 digits more than any format has."""
    if x <= 0 or not math.isfinite(x):
        with np.errstate(all="ignore"):
            return np.sqrt(np.float64(x))
    f = Fraction(x) * 2**2200
    return Fraction(math.isqrt(int(f * 2**200)), 2**1200)


ARITHMETIC = {
    "add": exactly(operator.add), "sub": exactly(operator.sub), "mul": exactly(operator.mul),
}  # fmt: skip
UNARY = {"neg": operator.neg, "abs": abs}
EXTREMES = {"min": least, "max": greatest}
FLOAT = [
    *[Case(f"{f}{rn}.f32", "f32 f32 f32", d) for f, d in ARITHMETIC.items() for rn in ("", ".rn")],
    *[Case(f"{f}.ftz.f32", "f32 f32 f32", with_flush(d)) for f, d in ARITHMETIC.items()],
    *[Case(f"{f}{rn}.f64", "f64 f64 f64", d) for f, d in ARITHMETIC.items() for rn in ("", ".rn")],
    Case("div.rn.f32", "f32 f32 f32", exactly(operator.truediv)),
    Case("div.rn.ftz.f32", "f32 f32 f32", with_flush(exactly(operator.truediv))),
    Case("div.rn.f64", "f64 f64 f64", exactly(operator.truediv)),
    Case("fma.rn.f32", "f32 f32 f32 f32", exactly(fused)),
    Case("fma.rn.ftz.f32", "f32 f32 f32 f32", with_flush(exactly(fused))),
    Case("fma.rn.f64", "f64 f64 f64 f64", exactly(fused)),
    *[Case(f"sqrt.rn.{t}", f"{t} {t}", root) for t in ("f32", "f64")],
    Case("sqrt.rn.ftz.f32", "f32 f32", with_flush(root)),
    *[Case(f"rcp.rn.{t}", f"{t} {t}", lambda a: exactly(operator.truediv)(1.0, a)) for t in ("f32", "f64")],
    Case("rcp.rn.ftz.f32", "f32 f32", with_flush(lambda a: exactly(operator.truediv)(1.0, a))),
    *[Case(f"{f}.{t}", f"{t} {t}", d) for f, d in UNARY.items() for t in ("f32", "f64", "bf16", "f16")],
    *[Case(f"{f}.ftz.f32", "f32 f32", with_flush(d)) for f, d in UNARY.items()],
    *[Case(f"{f}.{t}", f"{t} {t} {t}", d) for f, d in EXTREMES.items() for t in ("f32", "f64", *HALVES)],
    *[Case(f"{f}.NaN.f32", "f32 f32 f32", or_nan(d)) for f, d in EXTREMES.items()],
    *[Case(f"{f}.f32", "f32 f32 f32 f32", d) for f, d in EXTREMES.items()],
    *[Case(f"{f}{rn}.{t}", f"{t} {t} {t}", d) for f, d in ARITHMETIC.items() for rn in ("", ".rn") for t in HALVES],
    *[Case(f"{f}.rn.f32.{t}", f"f32 {t} f32", ARITHMETIC[f]) for f in ("add", "sub") for t in HALVES],
    *[Case(f"fma.rn.f32.{t}", f"f32 {t} {t} f32", exactly(fused)) for t in HALVES],
]  # fmt: skip


@each(FLOAT)
def test_floats(case) -> None:
    check(case)


@each(
    [
        case
        for f, d in EXTREMES.items()
        for case in (
            Case(f"{f}.ftz.f32", "f32 f32 f32", with_flush(d)),
            Case(f"{f}.ftz.f32", "f32 f32 f32 f32", with_flush(d)),
            Case(f"{f}.ftz.NaN.f32", "f32 f32 f32", with_flush(or_nan(d))),
        )
    ]
)
def test_extremes_flush_denormal_numbers(case) -> None:
    check(case)


def beside_halfway(kind: str) -> list[tuple[int, ...]]:
    """Factors whose product lies halfway between two numbers, and an addend that is tiny."""
    first, second, tiny = (3, 683 / 2048, 2.0**-24) if kind == "f16" else (7, 37 / 256, 2.0**-30)
    return [(encode(first, kind), encode(second, kind), encode(c, kind)) for c in (tiny, -tiny)]


@each([Case(f"fma.rn.{t}", f"{t} {t} {t} {t}", exactly(fused)) for t in HALVES])
def test_fused_halves(case) -> None:
    """They are rounded once."""
    kind = case.types.split()[0]
    check(case, [*rows_of([kind] * 3), *beside_halfway(kind)])


PAIRS = [
    *[Case(f"{f}.{t}x2", f"{t} {t} {t}", d) for f, d in (ARITHMETIC | EXTREMES).items() for t in HALVES],
    *[Case(f"{f}.{t}x2", f"{t} {t}", d) for f, d in UNARY.items() for t in HALVES],
    *[Case(f"{f}.rn.f32x2", "f32 f32 f32", d) for f, d in ARITHMETIC.items()],
    Case("fma.rn.f32x2", "f32 f32 f32 f32", exactly(fused)),
    *[Case(f"fma.rn.{t}x2", f"{t} {t} {t} {t}", exactly(fused)) for t in HALVES],
]


@each(PAIRS)
def test_pairs(case) -> None:
    """Each half of the registers is a number of its own."""
    kind, *operands = case.types.split()
    bits = width(kind)
    rows = rows_of(operands) + (beside_halfway(kind) if case.opcode.startswith("fma") and bits == 16 else [])
    columns = [[low | high << bits for low, high in zip(c, reversed(c), strict=True)] for c in zip(*rows, strict=True)]
    found = execute(case.opcode, f"b{2 * bits}", " ".join([f"b{2 * bits}"] * len(operands)), columns)
    for low_row, high_row, result in zip(rows, reversed(rows), found, strict=True):
        for row, part in ((low_row, result & ((1 << bits) - 1)), (high_row, result >> bits)):
            wanted = case.definition(*(decode(x, kind) for x in row))
            assert (is_nan(part, kind) and np.isnan(wanted)) or part == encode(wanted, kind), (case.opcode, row)


def unordered(compare: Callable) -> Callable:
    return lambda a, b: math.isnan(a) or math.isnan(b) or compare(a, b)


def numbers(a: float, b: float) -> bool:
    return not math.isnan(a) and not math.isnan(b)


FLOAT_COMPARE = {
    **COMPARE,
    "ne": lambda a, b: numbers(a, b) and a != b,
    **{f"{f}u": unordered(d) for f, d in COMPARE.items()},
    "num": numbers,
    "nan": lambda a, b: not numbers(a, b),
}


@each(
    [Case(f"setp.{f}.{t}", f"pred {t} {t}", d) for f, d in FLOAT_COMPARE.items() for t in ("f32", "f64", "bf16", "f16")]
)
def test_float_comparison(case) -> None:
    check(case)


@each(
    [
        Case(f"setp.{f}.ftz.f32", "pred f32 f32", lambda a, b, d=d: d(flushed(a), flushed(b)))
        for f, d in FLOAT_COMPARE.items()
    ]
)
def test_comparison_flushes_denormal_numbers(case) -> None:
    check(case)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_comparison_of_pairs(kind) -> None:
    rows = rows_of([kind] * 4)
    columns = [
        [a | b << 16 for a, b in ((r[0], r[1]) for r in rows)],
        [a | b << 16 for a, b in ((r[2], r[3]) for r in rows)],
    ]
    low, high = execute(f"setp.num.{kind}x2", "pred pred", "b32 b32", columns)
    for row, *found in zip(rows, low, high, strict=True):
        a, b, c, d = (decode(x, kind) for x in row)
        assert found == [numbers(a, c), numbers(b, d)]


TESTED.update((f"setp.num.{kind}x2", 3) for kind in HALVES)


# ---- approximations
def inverse_root(x: float) -> float:
    return 1 / np.sqrt(x)


class Approximation(NamedTuple):
    """A function of doubles, the error that the ISA allows, and exact results for some operands."""

    opcode: str
    kind: str
    function: Callable
    relative: float
    absolute: float
    table: list[tuple[float, float]]
    domain: tuple[float, float] = (-math.inf, math.inf)


INFINITY, NAN = math.inf, math.nan
ENDS = (INFINITY, -INFINITY, 0.0, -0.0, -1.0)


def at_ends(*results: float) -> list[tuple[float, float]]:
    return list(zip(ENDS, results, strict=False))


TURN = (-2 * math.pi, 2 * math.pi)
APPROXIMATIONS = [
    Approximation("ex2.approx.f32", "f32", np.exp2, 2**-22, 2**-149, at_ends(INFINITY, 0.0, 1.0, 1.0, 0.5)),
    Approximation("lg2.approx.f32", "f32", np.log2, 2**-22, 2**-22, at_ends(INFINITY, NAN, -INFINITY, -INFINITY, NAN)),
    Approximation("rcp.approx.f32", "f32", np.reciprocal, 2**-23, 2**-149, at_ends(0.0, -0.0, INFINITY, -INFINITY)),
    Approximation("sqrt.approx.f32", "f32", np.sqrt, 2**-23, 0, at_ends(INFINITY, NAN, 0.0, -0.0, NAN)),
    *[
        Approximation(f"rsqrt.approx.{t}", t, inverse_root, 2**-22.4, 0, at_ends(0.0, NAN, INFINITY, -INFINITY, NAN))
        for t in ("f32", "f64")
    ],
    Approximation("sin.approx.f32", "f32", np.sin, 0, 2**-20.5, at_ends(NAN, NAN, 0.0, -0.0), TURN),
    Approximation("cos.approx.f32", "f32", np.cos, 0, 2**-20.5, at_ends(NAN, NAN, 1.0, 1.0), TURN),
    Approximation("tanh.approx.f32", "f32", np.tanh, 2**-11, 0, at_ends(1.0, -1.0, 0.0, -0.0)),
]
FLUSHING = [
    a._replace(opcode=a.opcode.replace("approx", "approx.ftz"))
    for a in APPROXIMATIONS
    if a.kind == "f32" and not a.opcode.startswith("tanh")
]
TESTED.update((a.opcode, 2) for a in APPROXIMATIONS + FLUSHING)


@pytest.mark.parametrize(
    "a",
    [pytest.param(a, id=a.opcode) for a in APPROXIMATIONS + FLUSHING],
)
def test_approximation(a) -> None:
    flush = flushed if "ftz" in a.opcode else float
    inputs = [x for x in (decode(bits, a.kind) for bits in edges(a.kind)) if x == x] + [
        x / 64 for x in range(-600, 600)
    ]
    inputs = [x for x in inputs if a.domain[0] <= x <= a.domain[1]] + [NAN]
    found = execute(a.opcode, a.kind, a.kind, [[encode(x, a.kind) for x in inputs]])
    with np.errstate(all="ignore"):
        wanted = [float(a.function(np.float64(flush(x)))) for x in inputs]
    for x, bits, exact in zip(inputs, found, wanted, strict=True):
        result = decode(bits, a.kind)
        flat = decode(encode(exact, a.kind), a.kind)
        if math.isnan(flat) or math.isinf(flat) or flat == 0:
            same = result == flat or (math.isnan(flat) and math.isnan(result))
            tiny = flat == 0 and abs(result) <= 2.0**-149
            assert same or tiny, f"{a.opcode} of {x} gives {result}, not {flat}"
        else:
            assert abs(result - flush(exact)) <= max(a.relative * abs(exact), a.absolute), (
                f"{a.opcode} of {x} gives {result}"
            )
    ends = execute(a.opcode, a.kind, a.kind, [[encode(x, a.kind) for x, _ in a.table]])
    for (x, exact), bits in zip(a.table, ends, strict=True):
        assert bits == encode(exact, a.kind) or (math.isnan(exact) and is_nan(bits, a.kind)), f"{a.opcode} of {x}"


@each(
    [
        Case(f"div.{f}.f32", "f32 f32 f32", exactly(operator.truediv))
        for f in ("full", "approx", "full.ftz", "approx.ftz")
    ]
)
def test_approximate_division(case) -> None:
    """Two units in the last place, for divisors up to 2^126."""
    flush = flushed if "ftz" in case.opcode else float
    rows = [row for row in rows_of(["f32", "f32"]) if abs(decode(row[1], "f32")) <= 2.0**126]
    found = execute(case.opcode, "f32", "f32 f32", list(zip(*rows, strict=True)))
    for row, bits in zip(rows, found, strict=True):
        a, b = (flush(decode(x, "f32")) for x in row)
        result, wanted = decode(bits, "f32"), case.definition(a, b)
        if not isinstance(wanted, Fraction):
            assert bits == encode(wanted, "f32") or (math.isnan(result) and math.isnan(wanted)), (a, b)
            continue
        wanted = flush(nearest(wanted, "f32"))
        assert result == wanted or abs(result - wanted) <= max(2 * 2.0**-23 * abs(wanted), 2.0**-149), (a, b)
