"""feature_resample against an explicit sum over four taps, on every backend that runs here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_true_to, assert_within_budget, value_and_gradients
from torch import Tensor

from mova_kernels import backends
from mova_kernels.ops import feature_resample

pytestmark = pytest.mark.usefixtures("poisoned_memory")
RAW = torch.ops.mova_kernels

SIZES = {
    "enlarge, not square": ((2, 3), (4, 5)),
    "shrink without antialiasing, some tokens are never read": ((7, 5), (3, 2)),
    "from one token, every tap is clamped": ((1, 1), (3, 3)),
    "to one token": ((4, 3), (1, 1)),
    "ratio 3:2 as from 72 to 48": ((6, 6), (4, 4)),
    "one side stays": ((3, 4), (3, 7)),
}
sizes = pytest.mark.parametrize(("in_size", "out_size"), SIZES.values(), ids=SIZES)
ROWS = {
    "negatives give zeros": [-1, 1, -7],
    "repeats, out of order": [2, 0, 2, 2],
    "none at all": [],
}
WIDTH = 19  # no multiple of any vector register


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        return backends.choose("feature_resample", request.param, torch.device("cpu"), torch.float32)
    except backends.BackendError as error:
        pytest.skip(str(error))


def four_taps(x: Tensor, in_size: tuple[int, int], out_size: tuple[int, int], rows: list[int] | None = None) -> Tensor:
    """The contract's formula, token by token."""
    (h, w), (big_h, big_w) = in_size, out_size
    samples = [x[r] if r >= 0 else torch.zeros_like(x[0]) for r in (range(len(x)) if rows is None else rows)]
    if not samples:
        return x.sum() * x.new_zeros(0, big_h * big_w, x.shape[2])
    tokens = []
    for i in range(big_h):
        v = max((i + 0.5) * h / big_h - 0.5, 0.0)
        for j in range(big_w):
            u = max((j + 0.5) * w / big_w - 0.5, 0.0)
            total = 0
            for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = abs(1 - di - v + math.floor(v)) * abs(1 - dj - u + math.floor(u))
                tap = min(math.floor(v) + di, h - 1) * w + min(math.floor(u) + dj, w - 1)
                total = total + weight * torch.stack([s[tap] for s in samples])
            tokens.append(total)
    return torch.stack(tokens, 1)


def interpolate(x: Tensor, in_size: tuple[int, int], out_size: tuple[int, int]) -> Tensor:
    """Plain torch, in the dtype and layout of images."""
    image = x.transpose(1, 2).unflatten(2, in_size).contiguous()
    return F.interpolate(image, out_size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def tensor_rows(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


@sizes
def test_reference_is_the_sum_over_four_taps(in_size, out_size) -> None:
    x = torch.randn(2, math.prod(in_size), WIDTH, dtype=torch.float64)
    assert_true_to(
        lambda x: four_taps(x, in_size, out_size),
        lambda x: feature_resample(x, in_size, out_size, backend="reference"),
        [x],
    )


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("out_size", [(4, 5), (2, 3)], ids=["resampled", "equal sizes still gather"])
def test_rows_choose_the_rows(rows, out_size) -> None:
    x = torch.randn(3, 6, WIDTH, dtype=torch.float64)
    assert_true_to(
        lambda x: four_taps(x, (2, 3), out_size, rows),
        lambda x: feature_resample(x, (2, 3), out_size, tensor_rows(rows), backend="reference"),
        [x],
    )


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(in_size, out_size, dtype, backend) -> None:
    assert_within_budget(
        lambda x: four_taps(x, in_size, out_size),
        lambda x: feature_resample(x, in_size, out_size, backend=backend),
        lambda x: interpolate(x, in_size, out_size),
        lambda: [torch.randn(2, math.prod(in_size), WIDTH)],
        dtype,
    )


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_backends_agree_on_rows(rows, backend) -> None:
    assert_within_budget(
        lambda x: four_taps(x, (2, 3), (4, 5), rows),
        lambda x: feature_resample(x, (2, 3), (4, 5), tensor_rows(rows), backend=backend),
        lambda x: feature_resample(x, (2, 3), (4, 5), tensor_rows(rows), backend="reference"),
        lambda: [torch.randn(3, 6, WIDTH)],
        torch.float32,
    )


@sizes
def test_raw_backward_is_autograd_of_the_reference(in_size, out_size, backend) -> None:
    x = torch.randn(2, math.prod(in_size), WIDTH, requires_grad=True)
    y = interpolate(x, in_size, out_size)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(RAW.feature_resample_bwd(grad, in_size, out_size, backend), expected)


@pytest.mark.parametrize("rows", [None, [2, -1, 2]], ids=["all rows", "chosen rows"])
def test_gradcheck(rows) -> None:
    x = torch.randn(3, 6, 2, dtype=torch.float64, requires_grad=True)
    rows = None if rows is None else tensor_rows(rows)
    torch.autograd.gradcheck(lambda x: feature_resample(x, (2, 3), (3, 2), rows), (x,))


WIDE = torch.linspace(-1, 1, 3 * 6 * 50).view(3, 6, 50)


@pytest.mark.parametrize(
    "x",
    [WIDE[:, :, 7:26], WIDE[::2], torch.linspace(-1, 1, 3 * WIDTH * 6).view(3, WIDTH, 6).transpose(1, 2)],
    ids=["channel slice, as the official tower hands it over", "every other sample", "no adjacent channels"],
)
def test_strides_of_tokens_are_honoured(x, backend) -> None:
    y = feature_resample(x, (2, 3), (4, 3), backend=backend)
    assert y.is_contiguous()
    assert torch.equal(y, feature_resample(x.contiguous(), (2, 3), (4, 3), backend=backend))


@pytest.mark.parametrize(
    "grad",
    [WIDE[:, :, :1].expand(3, 6, WIDTH), torch.ones(1).expand(3, 6, WIDTH), WIDE[:, :, 7:26]],
    ids=["no adjacent channels", "all strides zero, as after sum()", "channel slice"],
)
def test_strides_of_gradients_are_honoured(grad, backend) -> None:
    expected = RAW.feature_resample_bwd(grad.contiguous(), (4, 3), (2, 3), backend)
    assert torch.equal(RAW.feature_resample_bwd(grad, (4, 3), (2, 3), backend), expected)


def test_negative_rows_read_nothing(backend) -> None:
    x = torch.randn(2, 6, WIDTH)
    x[1] = torch.nan
    y, grad = value_and_gradients(
        lambda x: feature_resample(x, (2, 3), (4, 5), tensor_rows([0, -1]), backend=backend), [x]
    )
    assert torch.equal(y[0], feature_resample(x[:1], (2, 3), (4, 5), backend=backend)[0])
    assert not y[1].any() and not grad[1].any() and grad.isfinite().all()


def test_nan_behind_a_weight_of_zero_is_nan(backend) -> None:
    x = torch.ones(1, 9, WIDTH)
    x[0, 5] = torch.nan  # right of the centre, on which the only sample point falls
    assert feature_resample(x, (3, 3), (1, 1), backend=backend).isnan().all()


def test_equal_sizes_give_x_itself() -> None:
    x = torch.randn(2, 6, 4)
    assert feature_resample(x, (2, 3), (2, 3)) is x


def test_no_sample(backend) -> None:
    x = torch.randn(0, 6, WIDTH)
    y, grad = value_and_gradients(lambda x: feature_resample(x, (2, 3), (4, 5), backend=backend), [x])
    assert y.shape == (0, 20, WIDTH) and grad.shape == x.shape


@pytest.mark.parametrize("rows", [None, [1, -1, 1]], ids=["all rows", "chosen rows"])
def test_opcheck(rows) -> None:
    rows = None if rows is None else tensor_rows(rows)
    for x in (torch.randn(2, 6, 4), torch.randn(2, 6, 9)[..., 2:6], torch.randn(2, 4, 6).transpose(1, 2)):
        torch.library.opcheck(RAW.feature_resample_fwd.default, (x, rows, [2, 3], [4, 5], None))
    for grad in (torch.randn(2, 20, 4), torch.randn(2, 4, 20).transpose(1, 2), torch.ones(1).expand(2, 20, 4)):
        torch.library.opcheck(RAW.feature_resample_bwd.default, (grad, [2, 3], [4, 5], None))


def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()

    def block(x: Tensor, rows: Tensor) -> Tensor:
        return (feature_resample(x * 2, (2, 3), (4, 5), rows) + feature_resample(x, (2, 3), (3, 2))[:1, :1]).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for num_rows in (3, 5):  # a second batch size makes the graph dynamic
        x, rows = torch.randn(num_rows, 6, 4), tensor_rows([2, -1, 2])
        expected = value_and_gradients(lambda x: block(x, rows), [x])  # noqa: B023
        actual = value_and_gradients(lambda x: compiled(x, rows), [x])  # noqa: B023
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, rows), block(x, rows))


def test_inductor_finds_the_promised_strides() -> None:
    """Only the op, as nothing else has to be compiled then; inductor asserts sizes and strides after each call."""
    torch._dynamo.reset()
    x = torch.randn(3, 6, 9)[..., 2:6]
    compiled = torch.compile(feature_resample, fullgraph=True, backend="inductor")
    expected = value_and_gradients(lambda x: feature_resample(x, (2, 3), (4, 5)), [x])
    torch.testing.assert_close(value_and_gradients(lambda x: compiled(x, (2, 3), (4, 5)), [x]), expected)


def test_exported_program_serves_other_batches() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return feature_resample(x, (2, 3), (4, 5), rows)

    examples = torch.randn(3, 6, 4), tensor_rows([2, -1])
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    program = torch.export.export(Module(), examples, dynamic_shapes=dynamic)
    for inputs in (examples, (torch.randn(5, 6, 4), tensor_rows([4, 4, 0]))):
        assert torch.equal(program.module()(*inputs), Module()(*inputs))


X = torch.zeros(2, 6, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, (0, 6), (4, 4)), ValueError, r"in_size must be two positive integers, got \(0, 6\)"),
        ((X, (2, 3), (4,)), ValueError, r"out_size must be two positive integers, got \(4,\)"),
        ((X, (3, 3), (4, 4)), ValueError, r"x must have shape \(R, 9, C\), got \(2, 6, 4\)"),
        ((X[0], (2, 3), (4, 4)), ValueError, r"x must have shape \(R, 6, C\), got \(6, 4\)"),
        (([0.0], (2, 3), (4, 4)), TypeError, "x must be a tensor, got 'list'"),
        ((X.long(), (2, 3), (4, 4)), TypeError, r"x must be floating point, got torch\.int64"),
        ((X, (2, 3), (4, 4), torch.zeros(2, 1).long()), ValueError, r"rows must have shape \(M\), got \(2, 1\)"),
        ((X, (2, 3), (4, 4), torch.zeros(2)), TypeError, r"rows must be int64, got torch\.float32"),
        ((X, (2, 3), (4, 4), torch.zeros(2, device="meta").long()), ValueError, "rows must be on x's cpu, got .*meta"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        feature_resample(*arguments)
