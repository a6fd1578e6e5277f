"""feature_resample in C++, called as cpu_impl calls it, on every instruction set of this processor."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from helpers import check_budget, interpolate
from torch import Tensor

from mova_kernels import _compiled
from mova_kernels.ops.feature_resample import cpu_impl

if _compiled.cpu_reason() is not None:
    pytest.skip(str(_compiled.cpu_reason()), allow_module_level=True)

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


def interpolate_backward(grad: Tensor, in_size: tuple[int, int], out_size: tuple[int, int], dtype: torch.dtype):
    x = torch.zeros(grad.shape[0], in_size[0] * in_size[1], grad.shape[2], dtype=dtype, requires_grad=True)
    return torch.autograd.grad(interpolate(x, in_size, out_size, dtype), x, grad.to(dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_size", "out_size", "channels"), CASES)
def test_forward(in_size, out_size, channels, dtype):
    x = torch.randn(2, in_size[0] * in_size[1], channels).to(dtype)
    y = cpu_impl.forward(x, None, in_size, out_size)
    plain, truth = (interpolate(x, in_size, out_size, t) for t in (torch.float32, torch.float64))
    assert y.is_contiguous()
    check_budget("y", y, truth, plain.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("in_size", "out_size", "channels"), CASES)
def test_backward(in_size, out_size, channels, dtype):
    grad = torch.randn(2, out_size[0] * out_size[1], channels).to(dtype)
    grad_x = cpu_impl.backward(grad, in_size, out_size)
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
                matrix = cpu_impl.forward(torch.eye(n)[None], None, in_size, out_size)[0]
                assert torch.equal(matrix, truth), f"{n} -> {m}"
                adjoint = cpu_impl.backward(torch.eye(m)[None], in_size, out_size)[0]
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
        y = cpu_impl.forward(x, None, (n, 1), (m, 1))
        assert y[0, outputs, range(len(outputs))].tolist() == [1] * len(outputs)
        grad = torch.zeros(1, m, len(outputs))
        grad[0, outputs, range(len(outputs))] = 1
        truth = torch.zeros(1, n, len(outputs)).scatter_(1, neighbours.T[None], torch.tensor(weights).T[None])
        assert torch.equal(cpu_impl.backward(grad, (n, 1), (m, 1)), truth), m


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype):
    """Repeated rows, unused ones, and negative ones, which give zeros and read nothing."""
    x = torch.randn(4, 6, 37).to(dtype)
    x[1] = torch.nan
    rows = torch.tensor([3, -1, 0, 3, -7, 2])
    y = cpu_impl.forward(x, rows, (2, 3), (4, 4))
    for m, row in enumerate(rows.tolist()):
        one = cpu_impl.forward(x[row : row + 1], None, (2, 3), (4, 4))[0] if row >= 0 else torch.zeros_like(y[m])
        assert torch.equal(y[m], one), m


def test_nothing_to_do():
    x = torch.randn(3, 6, 8)
    for y in (
        cpu_impl.forward(x, torch.empty(0, dtype=torch.int64), (2, 3), (4, 4)),
        cpu_impl.forward(x[:0], None, (2, 3), (4, 4)),
    ):
        assert y.shape == (0, 16, 8)
    assert cpu_impl.backward(torch.randn(0, 16, 8), (2, 3), (4, 4)).shape == (0, 6, 8)
    assert cpu_impl.forward(x[..., :0], None, (2, 3), (4, 4)).shape == (3, 16, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(dtype):
    """Slices of wider tensors, expanded rows, odd offsets, and channels that are not adjacent."""
    wide = torch.randn(3, 20, 90).to(dtype)
    for x in (wide[:, 4:16, 13:70], wide[:, :12], wide[:1, :12, 1:].expand(3, -1, -1), wide.mT[:, :12, :20]):
        for call in (
            lambda t: cpu_impl.forward(t, None, (3, 4), (5, 6)),
            lambda t: cpu_impl.backward(t, (6, 5), (3, 4)),
        ):
            assert torch.equal(call(x), call(x.contiguous()))
    rows = torch.tensor([[2, 0], [0, 0], [1, 0]])[:, 0]
    x = wide[:, :12]
    assert torch.equal(cpu_impl.forward(x, rows, (3, 4), (5, 6)), cpu_impl.forward(x[rows], None, (3, 4), (5, 6)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_nothing_else(dtype):
    """The output may be a slice of a wider tensor; the rest of it stays as it was."""
    x, rows = torch.randn(2, 6, 21).to(dtype), torch.tensor([1, -1, 0])
    wide = torch.full((3, 20, 40), torch.nan, dtype=dtype)
    y = wide[:, 2:18, 5:26]
    cpu_impl._fwd(**cpu_impl.fields(x, rows, y, [2, 3], [4, 4]))
    assert torch.equal(y, cpu_impl.forward(x, rows, (2, 3), (4, 4)))
    y.fill_(torch.nan)
    assert wide.isnan().all()


def test_bf16_rounding():
    """Every bf16 is copied as it is, NaN stays NaN, and a mean is rounded as torch rounds it."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    copy = cpu_impl.forward(every.view(1, 1, -1), None, (1, 1), (1, 1)).flatten()
    assert torch.equal(copy.isnan(), every.isnan())
    assert torch.equal(copy.view(torch.int16)[~every.isnan()], every.view(torch.int16)[~every.isnan()])
    other = every[torch.randperm(every.numel())]
    mean = cpu_impl.forward(torch.stack((every, other))[None], None, (1, 2), (1, 1)).flatten()
    torch.testing.assert_close(mean, (every.float() / 2 + other.float() / 2).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_tap_of_weight_zero_counts():
    """Output 0 of 2 lies exactly on input 1 of 6; like torch, it reads input 2 with weight 0, and 0 * NaN is NaN."""
    x = torch.zeros(1, 6, 1)
    x[0, 2] = torch.nan
    y = cpu_impl.forward(x, None, (1, 6), (1, 2))
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
            forward = cpu_impl.forward(x, None, (20, 20), (30, 30))
            results.append((forward, cpu_impl.backward(grad, (20, 20), (30, 30))))
    finally:
        torch.set_num_threads(before)
    for forward, backward in results[1:]:
        assert torch.equal(forward, results[0][0]) and torch.equal(backward, results[0][1])


def test_bad_arguments():
    x, y = torch.zeros(1, 4, 8), torch.zeros(1, 9, 8)
    with pytest.raises(ValueError, match=r"in_h must be in \[1, 32767\], got 0"):
        cpu_impl._fwd(**cpu_impl.fields(x, None, y, [0, 2], [3, 3]))
    with pytest.raises(ValueError, match="rows must be 0"):
        cpu_impl._bwd(**cpu_impl.fields(x, torch.zeros(1, dtype=torch.int64), y, [2, 2], [3, 3]))
    with pytest.raises(RuntimeError, match="float16 is not supported on the CPU"):
        cpu_impl.forward(x.half(), None, [2, 2], [3, 3])
