"""The matrix product in C++, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_threads_do_not_matter, check_budget
from torch import Tensor

from mova_kernels._linear import _matmul

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

# rows, depth, columns
SHAPES = {
    "one of each": (1, 1, 1),
    "less than a tile": (5, 3, 7),
    "panels of 66, 72 and 62 rows": (200, 20, 70),
    "odd depth": (9, 65, 66),
    "sums of two pieces": (13, 97, 20),
    "sums of many pieces, two groups of columns": (20, 1701, 300),
    "no depth": (3, 0, 5),
    "no row": (0, 4, 5),
}


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """a b + bias + added, in a tensor whose rows have gaps."""
    wide = a.new_empty(a.shape[0] + 1, b.shape[1] + 3)
    c = wide[:-1, 1:-2]
    _matmul(a=a, b=b, bias=bias, added=added, c=c, M=len(c), N=c.shape[1], K=len(b), dtype=a.dtype)
    assert wide[-1].isnan().all() and wide[:, :1].isnan().all() and wide[:, -2:].isnan().all()  # not ours
    return c


@dtypes
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("transposed", ["neither", "a", "b", "both"])
def test_error_budget(name, transposed, dtype):
    rows, depth, columns = SHAPES[name]
    sizes = ((rows, depth), (depth, columns), columns, (rows, columns))
    a, b, bias, added = (torch.randn(size).to(dtype) for size in sizes)
    if transposed in ("a", "both"):
        a = a.t().contiguous().t()
    if transposed in ("b", "both"):
        b = b.t().contiguous().t()
    truth = a.double() @ b.double()
    check_budget("product", multiply(a, b), truth, a @ b, norms=(2,), times=1.5)
    check_budget("sum", multiply(a, b, bias, added), truth + bias + added, a @ b + bias + added, norms=(2,), times=1.5)


def test_long_sums_are_no_less_exact_than_mkls():
    a, b = torch.randn(20, 3000), torch.randn(3000, 40)
    check_budget("product", multiply(a, b), a.double() @ b.double(), a @ b, norms=(2,), times=1.5)


@dtypes
def test_strides(dtype):
    """Neither the rows nor the columns of an operand are next to each other."""
    a, b = torch.randn(11, 3 * 67).to(dtype)[:, ::3], torch.randn(67, 5 * 70).to(dtype)[:, ::5]
    check_budget("product", multiply(a, b), a.double() @ b.double(), a @ b, norms=(2,), times=1.5)


@dtypes
def test_threads_do_not_change_results(dtype):
    a, b = torch.randn(300, 200).to(dtype), torch.randn(200, 600).to(dtype)
    assert_threads_do_not_matter(lambda: [multiply(a, b)])


@dtypes
def test_infinities_and_nan_stay_where_they_are(dtype):
    a, b = torch.randn(20, 30).to(dtype), torch.randn(30, 70).to(dtype)
    a[3, 4], b[5, 6] = torch.nan, torch.inf
    c = multiply(a, b)
    assert torch.equal(c.isfinite(), (a @ b).isfinite()) and not c[3].isfinite().any() and not c[:, 6].isfinite().any()


def test_bad_block():
    nothing = dict.fromkeys(("a", "b", "bias", "added", "c"))
    with pytest.raises(ValueError, match=r"mk_matmul: K must be in \[0, .*\], got -1"):
        _matmul(**nothing, M=1, N=1, K=-1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"mk_matmul: dtype must be in \[0, 1\], got 2"):
        _matmul(**nothing, M=1, N=1, K=1, dtype=torch.float16)
