"""rope2d in C++, on every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_threads_do_not_matter, assert_within_budget
from torch import Tensor

from mova_kernels.ops import rope2d, rope2d_table
from mova_kernels.ops.rope2d import cpu_impl

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")

TIMES = 1.5  # the error of torch in the same dtype that is allowed
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
RAW = torch.ops.mova_kernels


def turn(cos: Tensor, sin: Tensor) -> Callable[[Tensor], Tensor]:
    """The formula in the dtype of its input; the tables are rounded to it."""

    def function(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return x * cos[:, None].to(x.dtype) + torch.stack((-b, a), -1).flatten(-2) * sin[:, None].to(x.dtype)

    return function


@DTYPES
@pytest.mark.parametrize(
    ("heads", "width"),
    [
        pytest.param(3, 2, id="one-pair"),
        pytest.param(2, 12, id="less-than-a-vector"),
        pytest.param(2, 16, id="whole-vectors"),
        pytest.param(2, 44, id="vectors-and-a-rest"),
        pytest.param(16, 64, id="official"),
    ],
)
def test_rope2d(heads, width, dtype) -> None:
    """With tables that differ within a pair, which tells the adjoint from the rotation by the opposite angle."""
    tables = torch.randn(2, 6, width).unbind()
    assert_within_budget(
        turn(*tables),
        lambda x: rope2d(x, *tables, backend="cpu"),
        turn(*tables),
        lambda: [torch.randn(2, 6, heads, width)],
        dtype,
        times=TIMES,
    )


def test_rope2d_rounds_once() -> None:
    """Every bf16 stays what it is under a turn by nothing, NaN stays NaN, and sums are rounded as torch rounds them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(1, 256, 1, 256)
    pairs = torch.stack((every, torch.zeros_like(every)), -1).flatten(-2)
    y = RAW.rope2d_fwd(pairs, torch.ones(256, 512), torch.zeros(256, 512), "cpu")[..., ::2]
    numbers = ~every.isnan()
    assert torch.equal(y.isnan(), ~numbers)
    assert torch.equal(y[numbers].view(torch.int16), every[numbers].view(torch.int16))
    nan = torch.full((256, 512), 2**31 - 1, dtype=torch.int32).view(torch.float32)  # rounding would carry over
    assert RAW.rope2d_fwd(pairs, nan, nan, "cpu").isnan().all()
    x, tables = torch.randn(2, 25, 3, 20).bfloat16(), rope2d_table(5, 20)
    for op in (RAW.rope2d_fwd, RAW.rope2d_bwd):
        assert torch.equal(op(x, *tables, "cpu"), op(x.float(), *tables, "cpu").bfloat16())


@DTYPES
def test_strides_of_rope2d(dtype) -> None:
    """Slices at odd offsets, heads before tokens, expanded samples, and channels that are not adjacent."""
    cos, sin = rope2d_table(3, 20)
    for x in (
        torch.randn(2, 9, 3, 70).to(dtype)[..., 13:33],
        torch.randn(2, 3, 9, 20).to(dtype).transpose(1, 2),
        torch.randn(1, 9, 1, 20).to(dtype).expand(2, 9, 3, 20),
        torch.randn(2, 9, 20, 3).to(dtype).mT,
        torch.randn(2, 9, 9, 20).to(dtype)[:, :, 1::4],
    ):
        for op in (RAW.rope2d_fwd, RAW.rope2d_bwd):
            y = op(x, cos, sin, "cpu")
            assert y.is_contiguous() and torch.equal(y, op(x.contiguous(), cos, sin, "cpu"))


def test_tables_of_rope2d() -> None:
    """They are of another dtype, and not contiguous."""
    x, tables = torch.randn(2, 9, 3, 20), rope2d_table(3, 20)
    expected = RAW.rope2d_fwd(x, *tables, "cpu")
    assert torch.equal(RAW.rope2d_fwd(x, *(t.double().T.contiguous().T for t in tables), "cpu"), expected)


@DTYPES
def test_threads_do_not_change_rope2d(dtype) -> None:
    x, tables = torch.randn(3, 400, 5, 64).to(dtype), rope2d_table(20, 64)
    assert_threads_do_not_matter(lambda: [op(x, *tables, "cpu") for op in (RAW.rope2d_fwd, RAW.rope2d_bwd)])


def test_opcheck_of_rope2d() -> None:
    x, tables = torch.randn(2, 3, 9, 20).transpose(1, 2), rope2d_table(3, 20)
    for op in (RAW.rope2d_fwd, RAW.rope2d_bwd):
        torch.library.opcheck(op.default, (x, *tables, "cpu"))


def test_bad_arguments_of_rope2d() -> None:
    x, tables = torch.zeros(1, 9, 2, 8), rope2d_table(3, 8)
    with pytest.raises(ValueError, match=r"mk_rope2d: dtype must be in \[0, 1\], got 2"):
        cpu_impl.rotated(x.half(), *tables, False)
    with pytest.raises(ValueError, match="mk_rope2d: D must be even, got 7"):
        cpu_impl.rotated(x[..., :7], *(t[:, :7] for t in tables), False)
    with pytest.raises(ValueError, match="backend must be one of triton, cuda, cpu, got 'reference'"):
        RAW.rope2d_fwd(x, *tables, "reference")
