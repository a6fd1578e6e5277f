"""rope2d against multiplication by unit complex numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from helpers import assert_true_to, assert_within_budget, value_and_gradients
from torch import Tensor

from mova_kernels import BackendError, MoVAdapterConfig, _compiled, backends
from mova_kernels.dense_reference import rope_tables
from mova_kernels.ops import rope2d, rope2d_table

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# R, H, D: the smallest head width that has a pair for each axis; a grid side and heads of official proportions.
SHAPES = pytest.mark.parametrize(("side", "heads", "width"), [(3, 1, 4), (5, 3, 16)], ids=["smallest", "usual"])


@pytest.fixture(params=["reference", "cpu"])
def op(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """rope2d on each backend that has a CPU."""
    try:
        backends.choose("rope2d", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))
    return functools.partial(rope2d, backend=request.param)


def rotate(cos: Tensor, sin: Tensor):
    """Channels (2k, 2k + 1) are a complex number, the tables' column 2k its factor."""
    factor = torch.complex(cos[:, None, ::2].double(), sin[:, None, ::2].double())

    def truth(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * factor).flatten(-2)

    return truth


def plain(cos: Tensor, sin: Tensor):
    """The official formula with tables in the working dtype."""

    def function(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        turned = torch.stack((-b, a), -1).flatten(-2)
        return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)

    return function


@SHAPES
def test_reference_is_complex_multiplication(side, heads, width) -> None:
    tables = rope2d_table(side, width)
    x = torch.randn(2, side * side, heads, width, dtype=torch.float64)
    assert_true_to(rotate(*tables), lambda x: rope2d(x, *tables), [x])


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(side, heads, width, dtype, op) -> None:
    tables = rope2d_table(side, width)
    assert_within_budget(
        rotate(*tables),
        lambda x: op(x, *tables),
        plain(*tables),
        lambda: [torch.randn(2, side * side, heads, width)],
        dtype,
    )


def test_bf16_is_rounded_once(op) -> None:
    tables = rope2d_table(5, 16)
    x = torch.randn(2, 25, 3, 16).bfloat16()
    assert torch.equal(op(x, *tables), op(x.float(), *tables).bfloat16())


def test_gradcheck() -> None:
    tables = rope2d_table(2, 8)
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rope2d(x, *tables), (x,))


def test_inverse_rotation_is_the_gradient(op) -> None:
    cos, sin = rope2d_table(3, 8)
    x, grad = torch.randn(2, 2, 9, 1, 8).unbind()
    leaf = x.requires_grad_()
    op(leaf, cos, sin).backward(grad)
    torch.testing.assert_close(leaf.grad, op(grad, cos, -sin))


def test_tables_may_differ_within_a_pair(op) -> None:
    """No rotation then, but still what the formula says, and its adjoint."""
    x, cos, sin = torch.randn(2, 9, 3, 8), *torch.randn(2, 9, 8)
    for found, expected in zip(
        value_and_gradients(lambda x: op(x, cos, sin), [x]),
        value_and_gradients(lambda x: rope2d(x, cos, sin), [x.double()]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize(("side", "width"), [(48, 64), (7, 12), (1, 4)], ids=["official", "odd side", "one token"])
def test_table_turns_by_row_then_column(side, width) -> None:
    """Each pair k of an axis turns by position * 10000^(-2k / (D/2)).

    The exponent, at most 1, is rounded to fp32 before it is multiplied by ln(10000) < 9.3; with the roundings of the
    power, the reciprocal, the position (two), the product and the result an angle below R is off by < 16 R roundings.
    """
    cos, sin = rope2d_table(side, width)
    assert cos.shape == sin.shape == (side * side, width) and cos.dtype == sin.dtype == torch.float32
    angles = torch.empty(side * side, width, dtype=torch.float64)
    for token in range(side * side):
        for channel in range(width):
            axis, within = divmod(channel, width // 2)
            position = token % side if axis else token // side
            angles[token, channel] = position * 10000.0 ** (-(within // 2) * 2 / (width // 2))
    allowed = 16 * side * torch.finfo(torch.float32).eps / 2
    assert (cos - angles.cos()).abs().max() <= allowed
    assert (sin - angles.sin()).abs().max() <= allowed


@pytest.mark.parametrize(("side", "heads", "width"), [(48, 16, 64), (21, 2, 12)], ids=["official", "t/R*R is not t"])
def test_table_is_the_oracles_bit_by_bit(side, heads, width) -> None:
    config = MoVAdapterConfig(in_channels=heads * width, num_heads=heads, resolution=side)
    for ours, theirs in zip(rope2d_table(side, width), rope_tables(config, "cpu", torch.float32), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_table_depends_on_no_default_dtype(dtype) -> None:
    """transformers' from_pretrained builds models under a default dtype of bfloat16."""
    expected = rope2d_table(21, 12)
    torch.set_default_dtype(dtype)
    try:
        found = rope2d_table(21, 12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(f.dtype == torch.float32 and torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_scores_depend_on_the_distance_alone() -> None:
    """The point of the embedding: <rope(q) at s, rope(k) at t> = <rope(q) at s + d, rope(k) at t + d>."""
    side = 6
    cos, sin = (t.double() for t in rope2d_table(side, 8))
    q, k = torch.randn(2, 8, dtype=torch.float64)
    turned_q, turned_k = (rope2d(t.expand(1, side * side, 1, 8), cos, sin)[0, :, 0].view(side, side, 8) for t in (q, k))
    near, far = turned_q[0, 3] @ turned_k[2, 1], turned_q[3, 5] @ turned_k[5, 3]
    rounding = 16 * side * torch.finfo(torch.float32).eps / 2  # of the tables, as above
    assert math.isclose(near, far, abs_tol=rounding * (q.norm() * k.norm()).item())


@pytest.mark.parametrize("shape", [(0, 9, 2, 8), (2, 9, 0, 8)], ids=["no sample", "no head"])
def test_nothing_to_do(shape, op) -> None:
    value, grad = value_and_gradients(lambda x: op(x, *rope2d_table(3, 8)), [torch.randn(shape)])
    assert value.shape == grad.shape == shape


LAYOUTS = {
    "a slice of one projection": lambda x: torch.cat([x, x, x], 2)[:, :, 3:6],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels are not adjacent": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_honoured(layout, op) -> None:
    tables = rope2d_table(3, 8)
    x = torch.randn(2, 9, 3, 8)
    torch.testing.assert_close(op(LAYOUTS[layout](x), *tables), op(x, *tables), rtol=0, atol=0)


def test_compile(op) -> None:
    torch._dynamo.reset()
    tables = rope2d_table(3, 8)
    inputs = [torch.randn(2, 9, 3, 8)]
    compiled = torch.compile(lambda x: op(x, *tables), fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(lambda x: op(x, *tables), inputs)
    torch.testing.assert_close(value_and_gradients(compiled, inputs), expected)


def test_auto_takes_what_was_compiled_for_this_processor(monkeypatch) -> None:
    for dtype, expected in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "reference")):
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
        assert backends.choose("rope2d", None, X.device, dtype) == expected
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: "it was never built")
        assert backends.choose("rope2d", None, X.device, dtype) == "reference"


X, TABLE = torch.zeros(2, 9, 1, 8), torch.zeros(9, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, TABLE, TABLE), TypeError, "x must be a tensor, got 'NoneType'"),
        ((X[0], TABLE, TABLE), ValueError, r"x must have shape \(B, L, H, D\), got \(9, 1, 8\)"),
        ((X, TABLE[:4], TABLE), ValueError, r"cos must have shape \(9, 8\), got \(4, 8\)"),
        ((X, TABLE, TABLE[:, :4]), ValueError, r"sin must have shape \(9, 8\), got \(9, 4\)"),
        ((X.long(), TABLE, TABLE), TypeError, r"x must be floating point, got torch\.int64"),
        ((X, TABLE, TABLE.to("meta")), ValueError, r"sin must be on x's cpu, got device\(type='meta'\)"),
        ((X[..., :3], TABLE[:, :3], TABLE[:, :3]), ValueError, "x must .*even"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        rope2d(*arguments)
