"""The Triton kernel of rope2d in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within_budget, value_and_gradients
from test_rope2d import plain, rotate
from torch import Tensor

from mova_kernels import BackendError, backends
from mova_kernels.ops import rope2d, rope2d_table

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")


def op(cos: Tensor, sin: Tensor):
    return lambda x: rope2d(x, cos, sin, backend="triton")


def tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Those of the first ``length`` places of a grid."""
    cos, sin = rope2d_table(int(length**0.5) + 1, width)
    return cos[:length], sin[:length]


# samples, tokens, heads, head width
SHAPES = {
    "official width, two tiles, the last one cut": (2, 20, 2, 64),
    "tiles and groups of heads are full": (1, 16, 4, 64),
    "two groups of heads, the last one cut": (1, 3, 5, 32),
    "the width fills no block": (2, 5, 3, 12),
    "one token, one head": (1, 1, 1, 8),
    "smallest width that has a pair for each axis": (1, 9, 1, 4),
    "a row is more than a tile": (1, 2, 1, 2048),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(name, dtype) -> None:
    shape = SHAPES[name]
    both = tables(shape[1], shape[3])
    assert_within_budget(rotate(*both), op(*both), plain(*both), lambda: [torch.randn(shape)], dtype, draws=3)


def test_bf16_is_rounded_once() -> None:
    both = tables(25, 16)
    x = torch.randn(2, 25, 3, 16).bfloat16()
    assert torch.equal(op(*both)(x), op(*both)(x.float()).bfloat16())


def test_tables_may_differ_within_a_channel_pair() -> None:
    """The gradient is the adjoint of whatever the tables say, not only of a rotation."""
    both, x = torch.randn(2, 9, 8), torch.randn(2, 9, 2, 8)
    reference = lambda x: rope2d(x, *both, backend="reference")  # noqa: E731
    torch.testing.assert_close(*(value_and_gradients(f, [x]) for f in (op(*both), reference)))


def test_tables_may_be_strided_or_narrow() -> None:
    both, x = [t.bfloat16() for t in tables(9, 8)], torch.randn(2, 9, 2, 8)
    wide = [t.float() for t in both]
    expected = value_and_gradients(op(*wide), [x])
    for tables_ in (both, torch.stack(wide, -1).unbind(-1)):
        torch.testing.assert_close(value_and_gradients(op(*tables_), [x]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_may_be_a_slice_of_one_projection(dtype) -> None:
    """Queries within queries, keys and values; the others are NaN."""
    both, x = tables(9, 8), torch.randn(2, 9, 3, 8, dtype=dtype)
    value, grad = value_and_gradients(op(*both), [x])
    packed = torch.full((2, 9, 3, 3, 8), torch.nan, dtype=dtype)
    packed[:, :, 1] = x
    expected = torch.zeros_like(packed)
    expected[:, :, 1] = grad
    found = value_and_gradients(lambda packed: op(*both)(packed[:, :, 1]), [packed])
    torch.testing.assert_close(found, [value, expected], rtol=0, atol=0)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)], ids=["heads", "tokens", "channels"])
def test_strides_are_honoured(order) -> None:
    """Of tokens and gradients: heads or tokens first, or channels that are not adjacent."""
    both, x, cotangent = tables(9, 8), *torch.randn(2, 2, 9, 3, 8)
    inverse = [order.index(i) for i in range(4)]
    expected = value_and_gradients(op(*both), [x], cotangent)
    x, cotangent = (t.permute(order).contiguous().permute(inverse) for t in (x, cotangent))
    torch.testing.assert_close(value_and_gradients(op(*both), [x], cotangent), expected, rtol=0, atol=0)


def test_expanded_gradients_are_honoured() -> None:
    both, x = tables(9, 8), torch.randn(2, 9, 3, 8)
    for strided in (torch.ones(()).expand(x.shape), torch.randn(2, 1, 1, 8).expand(x.shape)):
        expected, found = (value_and_gradients(op(*both), [x], g) for g in (strided.contiguous(), strided))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 9, 2, 8), (2, 0, 2, 8), (2, 9, 0, 8), (2, 9, 2, 0)], ids=str)
def test_nothing_to_do(shape) -> None:
    both = torch.zeros(2, shape[1], shape[3])
    assert all(part.shape == shape for part in value_and_gradients(op(*both), [torch.zeros(shape)]))


def test_same_bits_every_time() -> None:
    both, x = tables(20, 64), torch.randn(2, 20, 2, 64)
    first, second = (value_and_gradients(op(*both), [x]) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_opcheck() -> None:
    arguments = (torch.randn(2, 9, 3, 8), *tables(9, 8), "triton")
    torch.library.opcheck(torch.ops.mova_kernels.rope2d_fwd.default, arguments)
    torch.library.opcheck(torch.ops.mova_kernels.rope2d_bwd.default, arguments)


def test_compile() -> None:
    both, x = tables(9, 8), torch.randn(2, 9, 3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(op(*both), fullgraph=True, backend="aot_eager")
    expected, found = (value_and_gradients(f, [x]) for f in (op(*both), compiled))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_wide_floats_are_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        op(*tables(9, 8))(torch.zeros(2, 9, 3, 8, dtype=torch.float64))


def test_auto_does_not_take_what_never_ran() -> None:
    assert backends.choose("rope2d", None, torch.device("cpu"), torch.float32) != "triton"
