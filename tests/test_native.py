"""The C++ kernels, called as native_impl calls them, on every instruction set of this processor."""

from __future__ import annotations

import importlib.util
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from helpers import check_budget
from torch import Tensor

from mova_kernels import _native
from mova_kernels.ops.feature_norm import native_impl as feature_norm
from mova_kernels.ops.feature_resample import native_impl

if _native.cpu_reason() is not None:
    pytest.skip(str(_native.cpu_reason()), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")

CASES = [  # in_size, out_size, C
    pytest.param((5, 7), (5, 7), 64, id="copy"),
    pytest.param((5, 7), (5, 12), 64, id="copy-of-one-axis"),
    pytest.param((37, 37), (48, 48), 20, id="upsampling-of-the-paper"),
    pytest.param((64, 64), (48, 48), 16, id="downsampling-of-the-paper"),
    pytest.param((3, 10), (7, 4), 1, id="both-ways,one-channel"),
    pytest.param((5, 3), (4, 9), 3, id="less-than-a-vector"),
    pytest.param((5, 3), (4, 9), 17, id="a-vector-and-a-rest"),
    pytest.param((4, 6), (6, 5), 100, id="vectors-and-a-rest"),
    pytest.param((3, 4), (5, 5), 600, id="passes,vectors-and-a-rest"),
    pytest.param((1, 1), (6, 5), 32, id="from-one-token"),
    pytest.param((6, 5), (1, 1), 32, id="to-one-token"),
    pytest.param((2, 2), (40, 40), 8, id="many-outputs-per-input"),
    pytest.param((40, 40), (2, 2), 8, id="most-inputs-unread"),
]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def interpolate(x: Tensor, in_size: tuple[int, int], out_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """torch's own resampling, computed in ``dtype`` on a (M, h*w, C) tensor."""
    grid = x.to(dtype).unflatten(1, in_size).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=out_size, mode="bilinear", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def interpolate_backward(grad: Tensor, in_size: tuple[int, int], out_size: tuple[int, int], dtype: torch.dtype):
    x = torch.zeros(grad.shape[0], in_size[0] * in_size[1], grad.shape[2], dtype=dtype, requires_grad=True)
    return torch.autograd.grad(interpolate(x, in_size, out_size, dtype), x, grad.to(dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_size", "out_size", "channels"), CASES)
def test_forward(in_size, out_size, channels, dtype):
    x = torch.randn(2, in_size[0] * in_size[1], channels).to(dtype)
    y = native_impl.cpu_forward(x, None, in_size, out_size)
    plain, truth = (interpolate(x, in_size, out_size, t) for t in (torch.float32, torch.float64))
    assert y.is_contiguous()
    check_budget("y", y, truth, plain.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_size", "out_size", "channels"), CASES)
def test_backward(in_size, out_size, channels, dtype):
    grad = torch.randn(2, out_size[0] * out_size[1], channels).to(dtype)
    grad_x = native_impl.cpu_backward(grad, in_size, out_size)
    plain, truth = (interpolate_backward(grad, in_size, out_size, t) for t in (torch.float32, torch.float64))
    assert grad_x.is_contiguous()
    check_budget("grad_x", grad_x, truth, plain.to(dtype))


def exact_weight(n: int, m: int, i: int, d: int) -> float:
    """The weight of input i in output d of an axis that goes from n to m tokens, in fractions."""
    position = min(max(Fraction((2 * d + 1) * n, 2 * m) - Fraction(1, 2), Fraction(0)), Fraction(n - 1))
    return float(max(1 - abs(position - i), Fraction(0)))


def test_taps():
    """The tables apart from the numbers: unit vectors in, and out comes the matrix of the map, rounded once."""
    for n in range(1, 14):
        for m in range(1, 14):
            truth = torch.tensor([[exact_weight(n, m, i, d) for i in range(n)] for d in range(m)])
            for in_size, out_size in (((1, n), (1, m)), ((n, 1), (m, 1))):
                matrix = native_impl.cpu_forward(torch.eye(n)[None], None, in_size, out_size)[0]
                assert torch.equal(matrix, truth), f"{n} -> {m}"
                adjoint = native_impl.cpu_backward(torch.eye(m)[None], in_size, out_size)[0]
                assert torch.equal(adjoint, truth.T), f"{n} -> {m}"


def test_longest_axis():
    """The products of the tap arithmetic just fit in 31 bits. (Here torch itself is off by 1e-3, in fp64 too.)"""
    n = 32767
    for m in (n - 1, n, 3):
        outputs = [0, 1, m // 3, m // 2, m - 2, m - 1]
        inputs = [min((2 * d + 1) * n // (2 * m), n - 1) for d in outputs]
        neighbours = torch.tensor([[max(i - 1, 0), i, min(i + 1, n - 1)] for i in inputs])
        weights = [[exact_weight(n, m, int(i), d) for i in three] for d, three in zip(outputs, neighbours, strict=True)]
        x = torch.zeros(1, n, len(outputs)).scatter_(1, neighbours.T[None], 1)
        y = native_impl.cpu_forward(x, None, (n, 1), (m, 1))
        assert y[0, outputs, range(len(outputs))].tolist() == [1] * len(outputs)
        grad = torch.zeros(1, m, len(outputs))
        grad[0, outputs, range(len(outputs))] = 1
        truth = torch.zeros(1, n, len(outputs)).scatter_(1, neighbours.T[None], torch.tensor(weights).T[None])
        assert torch.equal(native_impl.cpu_backward(grad, (n, 1), (m, 1)), truth), m


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype):
    """Repeated rows, unused ones, and negative ones, which give zeros and read nothing."""
    x = torch.randn(4, 6, 37).to(dtype)
    x[1] = torch.nan
    rows = torch.tensor([3, -1, 0, 3, -7, 2])
    y = native_impl.cpu_forward(x, rows, (2, 3), (4, 4))
    for m, row in enumerate(rows.tolist()):
        one = native_impl.cpu_forward(x[row : row + 1], None, (2, 3), (4, 4))[0] if row >= 0 else torch.zeros_like(y[m])
        assert torch.equal(y[m], one), m


def test_nothing_to_do():
    x = torch.randn(3, 6, 8)
    for y in (
        native_impl.cpu_forward(x, torch.empty(0, dtype=torch.int64), (2, 3), (4, 4)),
        native_impl.cpu_forward(x[:0], None, (2, 3), (4, 4)),
    ):
        assert y.shape == (0, 16, 8)
    assert native_impl.cpu_backward(torch.randn(0, 16, 8), (2, 3), (4, 4)).shape == (0, 6, 8)
    assert native_impl.cpu_forward(x[..., :0], None, (2, 3), (4, 4)).shape == (3, 16, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    """Slices of wider tensors, expanded rows, odd offsets, and channels that are not adjacent."""
    wide = torch.randn(3, 20, 90).to(dtype)
    for x in (wide[:, 4:16, 13:70], wide[:, :12], wide[:1, :12, 1:].expand(3, -1, -1), wide.mT[:, :12, :20]):
        for call in (
            lambda t: native_impl.cpu_forward(t, None, (3, 4), (5, 6)),
            lambda t: native_impl.cpu_backward(t, (6, 5), (3, 4)),
        ):
            assert torch.equal(call(x), call(x.contiguous()))
    rows = torch.tensor([[2, 0], [0, 0], [1, 0]])[:, 0]
    x = wide[:, :12]
    assert torch.equal(
        native_impl.cpu_forward(x, rows, (3, 4), (5, 6)), native_impl.cpu_forward(x[rows], None, (3, 4), (5, 6))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_nothing_else(dtype):
    """The output may be a slice of a wider tensor; the rest of it stays as it was."""
    x, rows = torch.randn(2, 6, 21).to(dtype), torch.tensor([1, -1, 0])
    wide = torch.full((3, 20, 40), torch.nan, dtype=dtype)
    y = wide[:, 2:18, 5:26]
    native_impl._cpu_fwd(**native_impl._block(x, rows, y, [2, 3], [4, 4]))
    assert torch.equal(y, native_impl.cpu_forward(x, rows, (2, 3), (4, 4)))
    y.fill_(torch.nan)
    assert wide.isnan().all()


def test_bf16_rounding():
    """Every bf16 is copied as it is, NaN stays NaN, and a mean is rounded as torch rounds it."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    copy = native_impl.cpu_forward(every.view(1, 1, -1), None, (1, 1), (1, 1)).flatten()
    assert torch.equal(copy.isnan(), every.isnan())
    assert torch.equal(copy.view(torch.int16)[~every.isnan()], every.view(torch.int16)[~every.isnan()])
    other = every[torch.randperm(every.numel())]
    mean = native_impl.cpu_forward(torch.stack((every, other))[None], None, (1, 2), (1, 1)).flatten()
    torch.testing.assert_close(mean, (every.float() / 2 + other.float() / 2).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_tap_of_weight_zero_counts():
    """Output 0 of 2 lies exactly on input 1 of 6; like torch, it reads input 2 with weight 0, and 0 * NaN is NaN."""
    x = torch.zeros(1, 6, 1)
    x[0, 2] = torch.nan
    y = native_impl.cpu_forward(x, None, (1, 6), (1, 2))
    assert torch.equal(y.isnan(), interpolate(x, (1, 6), (1, 2), torch.float32).isnan())
    assert y.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_results(dtype):
    x, grad = torch.randn(3, 400, 96).to(dtype), torch.randn(3, 900, 96).to(dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            forward = native_impl.cpu_forward(x, None, (20, 20), (30, 30))
            results.append((forward, native_impl.cpu_backward(grad, (20, 20), (30, 30))))
    finally:
        torch.set_num_threads(before)
    for forward, backward in results[1:]:
        assert torch.equal(forward, results[0][0]) and torch.equal(backward, results[0][1])


def test_bad_arguments():
    x, y = torch.zeros(1, 4, 8), torch.zeros(1, 9, 8)
    with pytest.raises(ValueError, match=r"in_h must be in \[1, 32767\], got 0"):
        native_impl._cpu_fwd(**native_impl._block(x, None, y, [0, 2], [3, 3]))
    with pytest.raises(ValueError, match="rows must be 0"):
        native_impl._cpu_bwd(**native_impl._block(x, torch.zeros(1, dtype=torch.int64), y, [2, 2], [3, 3]))
    with pytest.raises(RuntimeError, match="float16 is not supported on the CPU"):
        native_impl.cpu_forward(x.half(), None, [2, 2], [3, 3])


def norm(x: Tensor, rows: Tensor | None = None, in_size=(2, 3), out_size=(4, 4)) -> tuple[Tensor, Tensor]:
    (y,), (rstd,), _ = feature_norm.forward([x], [rows], [*in_size, *out_size], EPS)
    return y, rstd


def norm_backward(grad: Tensor, y: Tensor, rstd: Tensor, rows: Tensor | None, num_rows: int, in_size, out_size):
    return feature_norm.backward([grad], [y], [rstd], [rows], [num_rows], [*in_size, *out_size])[0]


def plain_norm(x: Tensor, in_size, out_size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """torch's own resampling and normalisation in ``dtype``, unrounded in between: values and 1 / sqrt(var + eps)."""
    y = interpolate(x, in_size, out_size, dtype)
    return F.layer_norm(y, y.shape[-1:], eps=EPS), (y.var(-1, correction=0) + EPS).rsqrt()


EPS = 1.0
WIDTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 600, 1536]  # around the vectors of every instruction set


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_size", [(4, 5), (2, 3)], ids=["resampled", "copied"])
@pytest.mark.parametrize("channels", WIDTHS)
def test_norm_and_its_gradient(channels, out_size, dtype):
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
def test_norm_of_the_widest_tokens(dtype):
    """They fill the buffer."""
    x = torch.randn(1, 6, 8192).to(dtype)
    truth, _ = plain_norm(x, (2, 3), (4, 4), torch.float64)
    torch.testing.assert_close(norm(x)[0], truth.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_rows(dtype):
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


def test_norm_refuses_rows_beyond_the_features():
    with pytest.raises(RuntimeError, match="rows must be below the features' 2 rows"):
        norm(torch.zeros(2, 6, 4), torch.tensor([0, 2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_strided_inputs(dtype):
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


def test_norm_of_nothing():
    for x, rows in ((torch.randn(0, 6, 8), None), (torch.randn(3, 6, 8), torch.empty(0, dtype=torch.int64))):
        y, rstd = norm(x, rows)
        assert y.shape == (0, 16, 8) and rstd.shape == (0, 16)
        grad = norm_backward(y, y, rstd, rows, len(x), (2, 3), (4, 4))
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_does_not_depend_on_threads(dtype):
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


def test_opcheck_of_the_norm():
    raw = torch.ops.mova_kernels
    rows, sizes = [torch.tensor([1, 0]), None], [2, 3, 4, 5, 4, 5]
    x = [torch.randn(6, 3, 4).transpose(0, 1), torch.randn(3, 20, 9)[..., 2:6]]
    torch.library.opcheck(raw.feature_norm_fwd.default, (x, rows, sizes, EPS, "cpu"))
    results, rstds = raw.feature_norm_fwd(x, rows, sizes, EPS, "cpu")
    grads = [torch.randn_like(y) for y in results]
    torch.library.opcheck(raw.feature_norm_bwd.default, (grads, results, rstds, rows, [3, 3], sizes, "cpu"))


def test_bad_arguments_of_the_norm():
    with pytest.raises(ValueError, match=r"in_h must be in \[1, 32767\], got 0"):
        norm(torch.zeros(1, 0, 8), in_size=(0, 2))
    with pytest.raises(ValueError, match=r"C must be in \[0, 8192\], got 8193"):
        norm(torch.zeros(1, 6, 8193))
    x = torch.zeros(1, 6, 8)
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 1\], got 2"):
        norm(x.half())
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 1\], got 2"):
        norm_backward(x.half(), x.half(), torch.zeros(1, 6), None, 1, (2, 3), (2, 3))


def test_instruction_set_is_never_replaced_silently(isa, monkeypatch):
    with pytest.raises(ValueError, match=r'must be one of base.*got "sse9"'):
        _native.set_cpu_isa("sse9")
    assert _native.cpu_isa() == isa
    for missing in {"base", "avx2", "avx512", "avx512_bf16"} - set(_native.cpu_isas()):
        with pytest.raises((RuntimeError, ValueError), match=missing):
            _native.set_cpu_isa(missing)
    monkeypatch.setenv("MOVA_CPU_ISA", "sse9")
    spec = importlib.util.spec_from_file_location("mova_kernels.second_import", _native.__file__)
    with pytest.raises(ValueError, match="sse9"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_library_of_another_version_or_none(monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "ABI_VERSION", 999)
    with pytest.raises(ImportError, match=r'ABI version \d+, mova_kernels needs 999: re-run "pip install -e \."'):
        _native._load("cpu")
    monkeypatch.setattr(_native, "_DIRECTORY", tmp_path)
    assert "is missing" in _native._load("cpu")


def test_cuda_says_why():
    reason = _native.cuda_reason()
    if reason is None:
        pytest.skip("CUDA is available")
    assert reason


def test_a_library_of_another_abi_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(_native, "ABI_VERSION", _native.ABI_VERSION + 1)
    with pytest.raises(ImportError, match=r'has ABI version \d+, mova_kernels needs \d+: re-run "pip install -e \."'):
        _native._load("cpu")
