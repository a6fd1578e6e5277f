"""The C++ passes of token_downsample, called as cpu_impl calls them, on every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget, check_budget
from torch import Tensor

from mova_kernels import _compiled
from mova_kernels.ops.token_downsample import cpu_impl, reference
from mova_kernels.ops.token_downsample.cpu_impl import (
    ADD_BWD,
    CONV,
    CONV_BWD,
    GATE_BWD,
    NORM_ADD,
    NORM_ADD_BWD,
    NORM_SILU,
    NORM_SILU_BWD,
)
from mova_kernels.ops.token_downsample.op import _Stage

if _compiled.cpu_reason() is not None:
    pytest.skip(str(_compiled.cpu_reason()), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-3
SHAPES = [  # R, C, pool
    pytest.param(2, 5, True, id="smallest-pooled"),
    pytest.param(1, 20, False, id="no-neighbours"),
    pytest.param(3, 3, True, id="3-to-1,less-than-a-vector"),
    pytest.param(4, 17, True, id="even,a-vector-and-a-rest"),
    pytest.param(5, 70, True, id="windows-overlap,a-pass-and-a-rest"),
    pytest.param(3, 165, False, id="not-pooled,passes,vectors-and-a-rest"),
]
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture(params=_compiled.cpu_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _compiled.cpu_isa()
    _compiled.set_cpu_isa(request.param)
    yield request.param
    _compiled.set_cpu_isa(before)


def draw(resolution: int, channels: int) -> list[Tensor]:
    """Two samples and the 13 parameters of a stage, none of which is 0 or 1 as after initialisation."""
    squeezed = max(1, channels // 4)
    square, row = (channels, channels, 1, 1), (channels,)
    shapes = (
        square, row, row, (channels, 1, 3, 3), row, row,
        (squeezed, channels, 1, 1), (squeezed,), (channels, squeezed, 1, 1), row, square, row, row,
    )  # fmt: skip
    weights = [torch.randn(shape) * (shape[1] ** -0.5 if len(shape) > 1 else 1) for shape in shapes]
    return [torch.randn(2, resolution**2, channels), *weights]


def stage(resolution: int, pool: bool):
    """The definition."""

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        y = reference._stage(x, resolution, reference.StageWeights.of(weights), EPS)
        if not pool:
            return y
        return reference._tokens(F.adaptive_avg_pool2d(reference._grid(y, resolution), resolution // 2))

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("resolution", "channels", "pool"), SHAPES)
def test_stage_and_its_gradients(resolution, channels, pool, dtype):
    plain = stage(resolution, pool)
    assert_within_budget(
        plain,
        lambda *tensors: _Stage.apply(*tensors, resolution, EPS, pool, "cpu")[0],
        plain,
        lambda: draw(resolution, channels),
        dtype,
        draws=101 if channels < 64 else 9,  # a gradient of one number decides by luck
        times=1.5,
    )


def step(
    which: Callable[..., None],
    x: Tensor,
    resolution: int,
    pool: bool = False,
    y: Tensor | None = None,
    **others: Tensor,
):
    """y and the sums of one step whose norm has random parameters."""
    norm = others.pop("norm", (torch.ones(x.shape[2]), torch.zeros(x.shape[2])))
    y = torch.empty_like(x) if y is None else y
    sums = cpu_impl.step(which, norm, x, y, resolution=resolution, eps=EPS, pool=pool, **others)
    return y, sums


def all_steps(num_samples: int, resolution: int, channels: int, pool: bool, dtype: torch.dtype) -> list[Tensor]:
    """The results and sums of all steps on random operands, the same at every call."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    side = resolution // 2 if pool else resolution
    x, grad, tokens = (noise(num_samples, resolution**2, channels).to(dtype) for _ in range(3))
    result = noise(num_samples, side**2, channels).to(dtype)
    norm = noise(channels), noise(channels)
    gate, grad_mean, taps = noise(num_samples, channels), noise(num_samples, channels), noise(9, channels)
    results = [
        step(NORM_SILU, x, resolution, norm=norm),
        step(NORM_SILU, x, resolution, norm=norm, gate=gate),
        step(CONV, x, resolution, norm=norm, taps=taps),
        step(NORM_ADD, x, resolution, pool, torch.empty_like(result), norm=norm, outer=tokens),
        step(NORM_ADD_BWD, x, resolution, pool, norm=norm, outer=result),
        step(GATE_BWD, x, resolution, norm=norm, grad=grad, gate=gate),
        step(NORM_SILU_BWD, x, resolution, norm=norm, grad=grad, gate=gate, grad_mean=grad_mean),
        step(CONV_BWD, x, resolution, norm=norm, grad=grad, taps=taps),
        step(ADD_BWD, x, resolution, pool, tokens, outer=result),
    ]
    return [t for pair in results for t in pair]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("resolution", "pool"), [(12, True), (13, True), (12, False)], ids=["even", "odd", "alone"])
def test_threads_do_not_change_results(resolution, pool, dtype):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(all_steps(3, resolution, 96, pool, dtype))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_widest_tokens(dtype):
    """They fill the buffers."""
    assert all(t.isfinite().all() for t in all_steps(1, 2, 8192, True, dtype))
    x = torch.randn(1, 4, 8192).to(dtype)
    truth, plain = (F.silu(F.layer_norm(x.to(t), (8192,), eps=EPS)) for t in (torch.float64, dtype))
    check_budget("y", step(NORM_SILU, x, 2)[0], truth, plain, times=1.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours(dtype):
    """Apart from the numbers: a single tap of 1 shifts the grid by one pixel, and its gradient shifts it back."""
    x = torch.randn(2, 12, 12, 7).to(dtype)
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    for k in range(9):
        taps = torch.zeros(9, 7)
        taps[k] = 1
        shifted = padded[:, k // 3 :, k % 3 :][:, :12, :12]
        y, _ = step(CONV, x.flatten(1, 2), 12, taps=taps)
        assert torch.equal(y, shifted.flatten(1, 2)), k
        # Where LN gives its bias 0, silu' is a half, and the gradient of the bias is the sum over all shifted tokens.
        _, sums = step(CONV_BWD, torch.ones_like(y), 12, grad=x.flatten(1, 2), taps=taps)
        back = padded[:, 2 - k // 3 :, 2 - k % 3 :][:, :12, :12]
        torch.testing.assert_close(sums[1], back.float().sum((0, 1, 2)) / 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("resolution", [4, 5], ids=["even", "odd"])
def test_pooling_and_its_adjoint(resolution, dtype):
    """Where LN gives its bias, the result is the pooled sum; strides are honoured."""
    wide = torch.randn(2, resolution**2, 40).to(dtype)
    d, bias = torch.zeros(2, resolution**2, 19).to(dtype), torch.randn(19)
    for tokens in (wide[..., :19], wide[:1, :, 3:22].expand(2, -1, -1)):
        out = torch.empty(2, 4, 19, dtype=dtype)
        step(NORM_ADD, d, resolution, True, out, norm=(torch.ones(19), bias), outer=tokens)
        grid = reference._grid(tokens.float() + bias, resolution)
        torch.testing.assert_close(out, reference._tokens(F.adaptive_avg_pool2d(grid, 2)).to(dtype))
    for result in (wide[:, :4, :19], wide[:1, :1, 3:22].expand(2, 4, -1)):
        grad = torch.zeros(2, resolution**2, 19).to(dtype)
        step(ADD_BWD, grad, resolution, True, grad, outer=result)
        leaf = torch.zeros(2, 19, resolution, resolution, requires_grad=True)
        pooled = F.adaptive_avg_pool2d(leaf, 2)
        (expected,) = torch.autograd.grad(pooled, leaf, reference._grid(result.float(), 2))
        torch.testing.assert_close(grad, reference._tokens(expected).to(dtype))


def test_gradient_in_place_of_a_gradient():
    """NORM_SILU_BWD may write where it reads."""
    x, grad, gate, grad_mean = torch.randn(2, 9, 37), torch.randn(2, 9, 37), torch.rand(2, 37), torch.randn(2, 37)
    expected = step(NORM_SILU_BWD, x, 3, grad=grad, gate=gate, grad_mean=grad_mean)
    found = step(NORM_SILU_BWD, x, 3, y=grad, grad=grad, gate=gate, grad_mean=grad_mean)
    assert all(map(torch.equal, found, expected))


def test_nothing_to_do():
    for x in (torch.randn(0, 4, 8), torch.randn(2, 4, 0)):
        for which in (NORM_SILU, CONV, CONV_BWD):
            y, sums = step(which, x, 2, grad=x, taps=torch.randn(9, x.shape[2]))
            assert y.shape == x.shape and not (sums[:1] if which == CONV_BWD else sums).any()


def test_bad_arguments():
    x = torch.zeros(1, 4, 8)
    for arguments, message in (
        ((NORM_SILU, x, 0), r"R must be in \[1, 16777216\], got 0"),
        ((NORM_ADD, x, 1, True), r"R must be in \[2, 16777216\], got 1"),
        ((NORM_SILU, torch.zeros(1, 4, 8193), 2), r"C must be in \[0, 8192\], got 8193"),
        ((NORM_SILU, x.half(), 2), r"dtype must be in \[0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            step(*arguments)


def test_sums_of_another_step_are_refused(monkeypatch):
    monkeypatch.setitem(cpu_impl._NUM_SUMS, NORM_SILU, 2)
    with pytest.raises(ValueError, match=r"mk_token_downsample_norm_silu: num_sums must be in \[0, 0\], got 2"):
        step(NORM_SILU, torch.zeros(1, 4, 8), 2)
