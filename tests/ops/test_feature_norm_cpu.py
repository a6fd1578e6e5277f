"""feature_norm in C++, called as cpu_impl calls it, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import check_budget, interpolate
from torch import Tensor

from mova_kernels import _compiled
from mova_kernels.ops.feature_norm import cpu_impl

if _compiled.cpu_reason() is not None:
    pytest.skip(str(_compiled.cpu_reason()), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")

EPS = 1.0
WIDTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 600, 1536]  # around the vectors of every instruction set
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def norm(x: Tensor, rows: Tensor | None = None, in_size=(2, 3), out_size=(4, 4)) -> tuple[Tensor, Tensor]:
    (y,), (rstd,), _ = cpu_impl.forward([x], [rows], [*in_size, *out_size], EPS)
    return y, rstd


def norm_backward(grad: Tensor, y: Tensor, rstd: Tensor, rows: Tensor | None, num_rows: int, in_size, out_size):
    return cpu_impl.backward([grad], [y], [rstd], [rows], [num_rows], [*in_size, *out_size])[0]


def plain_norm(x: Tensor, in_size, out_size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """torch's own resampling and normalisation in ``dtype``, unrounded in between: values and 1 / sqrt(var + eps)."""
    y = interpolate(x, in_size, out_size, dtype)
    return F.layer_norm(y, y.shape[-1:], eps=EPS), (y.var(-1, correction=0) + EPS).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_size", [(4, 5), (2, 3)], ids=["resampled", "copied"])
@pytest.mark.parametrize("channels", WIDTHS)
def test_and_its_gradient(channels, out_size, dtype):
    """A mean that is large beside the deviation: what a variance from squares or from empty lanes would not survive.

    And an eps as large as the variance: with two channels that are nearly equal, rounding decides.
    """
    x = (torch.randn(2, 6, channels) + 30).to(dtype)
    y, rstd = norm(x, out_size=out_size)
    grad = torch.randn_like(y)
    grad_x = norm_backward(grad, y, rstd, None, 2, (2, 3), out_size)
    found = {}
    for wide in (torch.float32, torch.float64):
        leaf = x.to(wide).requires_grad_()
        found[wide] = plain_norm(leaf, (2, 3), out_size, wide)
        found[wide] += torch.autograd.grad(found[wide][0], leaf, grad.to(wide))
    for name, actual, rival, truth in zip(
        ("y", "rstd", "grad_x"), (y, rstd, grad_x), found[torch.float32], found[torch.float64], strict=True
    ):
        rival = rival.to(actual.dtype)
        if (
            name == "grad_x" and dtype == torch.bfloat16
        ):  # from the rounded y, and rounded before the adjoint, as torch does
            leaf = x.detach().clone().requires_grad_()
            rounded = F.layer_norm(interpolate(leaf, (2, 3), out_size, dtype), (channels,), eps=EPS)
            rival = torch.autograd.grad(rounded, leaf, grad)[0]
        # Of few entries it is luck how large the largest error is.
        check_budget(name, actual, truth.detach(), rival.detach(), (2, torch.inf) if actual.numel() > 4096 else (2,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_widest_tokens(dtype):
    """They fill the buffer."""
    x = torch.randn(1, 6, 8192).to(dtype)
    truth, _ = plain_norm(x, (2, 3), (4, 4), torch.float64)
    torch.testing.assert_close(norm(x)[0], truth.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_rows(dtype):
    """Rows out of order, unused ones, and negative ones, for which nothing is read or written."""
    x, rows = torch.randn(4, 6, 37).to(dtype), torch.tensor([3, -1, 0, -7, 2])
    x[1] = torch.nan
    y, rstd = norm(x, rows)
    valid = rows >= 0
    assert y[~valid].isnan().all() and rstd[~valid].isnan().all()  # the memory was filled with NaN
    for actual, expected in zip((y[valid], rstd[valid]), norm(x[rows[valid]]), strict=True):
        assert torch.equal(actual, expected)
    for out_size in ((4, 4), (2, 3)):
        y, rstd = norm(x, rows, out_size=out_size)
        grad = torch.randn_like(y)
        grad[~valid] = torch.nan
        grad_x = norm_backward(grad, y, rstd, rows, 4, (2, 3), out_size)
        expected = norm_backward(grad[valid], y[valid], rstd[valid], None, 3, (2, 3), out_size)
        assert torch.equal(grad_x[rows[valid]], expected) and not grad_x[1].any()


def test_refuses_rows_beyond_the_features():
    with pytest.raises(RuntimeError, match="rows must be below the features' 2 rows"):
        norm(torch.zeros(2, 6, 4), torch.tensor([0, 2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_strided_inputs(dtype):
    wide = torch.randn(3, 20, 90).to(dtype)
    for x in (wide[:, 4:16, 13:70], wide[:, :12], wide[:1, :12, 1:].expand(3, -1, -1), wide.mT[:, :12, :20]):
        y, rstd = norm(x, in_size=(3, 4))
        assert torch.equal(y, norm(x.contiguous(), in_size=(3, 4))[0])
        y, rstd = norm(torch.randn(x.shape).to(dtype), in_size=(3, 4), out_size=(6, 2))
        gradients = [norm_backward(g, y, rstd, None, 3, (3, 4), (6, 2)) for g in (x, x.contiguous())]
        assert torch.equal(*gradients)
    rows, x = torch.tensor([[2, 0], [-1, 0], [1, 0]])[:, 0], wide[:, :12]
    y, rstd = norm(x, rows, in_size=(3, 4))
    assert torch.equal(y[[0, 2]], norm(x[[2, 1]], in_size=(3, 4))[0])
    found = norm_backward(y, y, rstd, rows, 3, (3, 4), (4, 4))
    assert torch.equal(found, norm_backward(y, y, rstd, rows.contiguous(), 3, (3, 4), (4, 4)))


def test_of_nothing():
    for x, rows in ((torch.randn(0, 6, 8), None), (torch.randn(3, 6, 8), torch.empty(0, dtype=torch.int64))):
        y, rstd = norm(x, rows)
        assert y.shape == (0, 16, 8) and rstd.shape == (0, 16)
        grad = norm_backward(y, y, rstd, rows, len(x), (2, 3), (4, 4))
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_does_not_depend_on_threads(dtype):
    """Nor on where a thread's part of the tokens begins, within a row."""
    x, grad = torch.randn(3, 400, 96).to(dtype), torch.randn(3, 900, 96).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, rstd = norm(x, None, (20, 20), (30, 30))
            results.append((y, rstd, norm_backward(grad, y, rstd, None, 3, (20, 20), (30, 30))))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


def test_opcheck():
    raw = torch.ops.mova_kernels
    rows, sizes = [torch.tensor([1, 0]), None], [2, 3, 4, 5, 4, 5]
    x = [torch.randn(6, 3, 4).transpose(0, 1), torch.randn(3, 20, 9)[..., 2:6]]
    torch.library.opcheck(raw.feature_norm_fwd.default, (x, rows, sizes, EPS, "cpu"))
    results, rstds = raw.feature_norm_fwd(x, rows, sizes, EPS, "cpu")
    grads = [torch.randn_like(y) for y in results]
    torch.library.opcheck(raw.feature_norm_bwd.default, (grads, results, rstds, rows, [3, 3], sizes, "cpu"))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"in_h must be in \[1, 32767\], got 0"):
        norm(torch.zeros(1, 0, 8), in_size=(0, 2))
    with pytest.raises(ValueError, match=r"C must be in \[0, 8192\], got 8193"):
        norm(torch.zeros(1, 6, 8193))
    x = torch.zeros(1, 6, 8)
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 1\], got 2"):
        norm(x.half())
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 1\], got 2"):
        norm_backward(x.half(), x.half(), torch.zeros(1, 6), None, 1, (2, 3), (2, 3))
