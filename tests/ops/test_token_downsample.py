"""token_downsample against nn.Conv2d and nn.LayerNorm on images, with pooling windows written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_true_to, assert_within_budget, value_and_gradients
from torch import Tensor, nn

from mova_kernels.ops import StageWeights, token_downsample

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTH = 8
SIDES = {"even": 4, "odd: windows overlap": 5, "smallest": 2, "3 to 1": 3}
sides = pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
PARAMETERS_PER_STAGE = 13


class Stage(nn.Module):
    """RegNet's bottleneck on (B, C, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.norm1 = nn.LayerNorm(width, 1e-5)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = nn.LayerNorm(width, 1e-5)
        self.squeeze = nn.Conv2d(width, width // 4, 1)
        self.excite = nn.Conv2d(width // 4, width, 1)
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.norm3 = nn.LayerNorm(width, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(on_channels(self.norm1, self.conv1(x)))
        y = F.silu(on_channels(self.norm2, self.conv2(y)))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + on_channels(self.norm3, self.conv3(y))


def on_channels(norm: nn.LayerNorm, image: Tensor) -> Tensor:
    return norm(image.movedim(1, -1)).movedim(-1, 1)


def images(side: int, width: int = WIDTH):
    """The op as modules; flat parameters in the order of nn.Module.parameters()."""
    stage = Stage(width)

    def function(x: Tensor, *flat: Tensor) -> Tensor:
        names = [name for name, _ in stage.named_parameters()]
        first, second = (dict(zip(names, flat[i : i + len(names)], strict=True)) for i in (0, PARAMETERS_PER_STAGE))
        image = torch.func.functional_call(stage, first, x.transpose(1, 2).unflatten(2, (side, side)))
        image = torch.func.functional_call(stage, second, pooled(image))
        return image.flatten(2).transpose(1, 2)

    return function


def pooled(image: Tensor) -> Tensor:
    """Window i of n reaches from floor(i R / n) to ceil((i + 1) R / n)."""
    size, half = image.shape[-1], image.shape[-1] // 2
    windows = [slice(i * size // half, math.ceil((i + 1) * size / half)) for i in range(half)]
    return torch.stack([torch.stack([image[:, :, r, c].mean((2, 3)) for c in windows], -1) for r in windows], -2)


def op(side: int, backend: str | None = None):
    def function(x: Tensor, *flat: Tensor) -> Tensor:
        return token_downsample(x, side, (stage_weights(flat[:13]), stage_weights(flat[13:])), backend=backend)

    return function


def stage_weights(flat: tuple[Tensor, ...]) -> StageWeights:
    conv1, g1, b1, conv2, g2, b2, squeeze, sb, excite, eb, conv3, g3, b3 = flat
    return StageWeights(conv1, (g1, b1), conv2, (g2, b2), (squeeze, sb), (excite, eb), conv3, (g3, b3))


def problem(
    side: int, dtype: torch.dtype = torch.float64, width: int = WIDTH, num_samples: int = 2
) -> list[Tensor]:  # fmt: skip
    """x and the parameters of two stages, none of which is 0 or 1 as after initialisation."""
    flat = [torch.randn(num_samples, side * side, width)]
    for _ in range(2):
        for p in Stage(width).parameters():
            scale = math.prod(p.shape[1:]) ** -0.5 if p.dim() > 1 else 0.5
            flat.append(p.detach() * (p.dim() == 1) + scale * torch.randn(p.shape))
    return [t.to(dtype) for t in flat]


@sides
def test_reference_is_the_modules_on_images(side) -> None:
    assert_true_to(images(side), op(side), problem(side))


@pytest.mark.parametrize("side", [4, 5], ids=["even", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(side, dtype) -> None:
    assert_within_budget(images(side), op(side), images(side), lambda: problem(side), dtype, draws=25)


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in problem(2)]
    torch.autograd.gradcheck(op(2), inputs, fast_mode=True)  # 500 parameters


def test_eps_is_that_of_all_norms() -> None:
    """With a huge eps every LayerNorm gives its bias, and the whole op is the pooled sum of x and two biases."""
    x, *flat = problem(4)
    found = token_downsample(x, 4, (stage_weights(flat[:13]), stage_weights(flat[13:])), 1e30)
    expected = x.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2) + flat[12] + flat[25]
    torch.testing.assert_close(found, expected)


def test_mixed_precision_keeps_the_tokens_dtype() -> None:
    """Norms may stay fp32 where convolutions are bf16."""
    x, *flat = problem(4, torch.bfloat16)
    flat = [t.float() if i % 13 in (1, 2, 4, 5, 11, 12) else t for i, t in enumerate(flat)]
    y = token_downsample(x, 4, (stage_weights(flat[:13]), stage_weights(flat[13:])))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_flat_weights_keep_their_order() -> None:
    flat = tuple(problem(2)[1:14])
    for weights in (stage_weights(flat), StageWeights.of(flat)):
        assert all(a is b for a, b in zip(weights.flat(), flat, strict=True))


def test_samples_do_not_see_each_other() -> None:
    x, *flat = problem(5)
    alone = op(5)(x[:1], *flat)
    x[1] = torch.nan
    torch.testing.assert_close(op(5)(x, *flat)[:1], alone)


def test_strides_are_honoured() -> None:
    """Tokens may be a channel slice, or an image's channels moved last."""
    x, *flat = problem(4)
    expected = value_and_gradients(op(4), [x, *flat])
    for view in (torch.cat([x, x], -1)[..., :WIDTH], x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.testing.assert_close(value_and_gradients(op(4), [view, *flat]), expected)


def test_no_sample() -> None:
    x, *flat = problem(4)
    value, *gradients = value_and_gradients(op(4), [x[:0], *flat])
    assert value.shape == (0, 4, WIDTH) and not any(g.any() for g in gradients)


X, STAGE = torch.zeros(2, 16, WIDTH), stage_weights(tuple(problem(2, torch.float32)[1:14]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, 1, (STAGE, STAGE)), ValueError, "resolution must be at least 2, got 1"),
        ((X, 5, (STAGE, STAGE)), ValueError, r"x must have shape \(B, 25, C\), got \(2, 16, 8\)"),
        ((None, 4, (STAGE, STAGE)), TypeError, "x must be a tensor, got 'NoneType'"),
        ((X, 4, (STAGE,)), ValueError, "stages must be two, got 1"),
        ((X[..., :4], 4, (STAGE, STAGE)), ValueError, r"conv1.* must have shape \(4, 4, 1, 1\), got \(8, 8, 1, 1\)"),
        (
            (X, 4, (STAGE, STAGE._replace(norm3=(torch.ones(1), torch.zeros(1))))),
            ValueError,
            r"norm3.* must have shape \(8\), got \(1,\)",
        ),
        (
            (X, 4, (STAGE, STAGE._replace(conv2=STAGE.conv2.double()))),
            ValueError,
            r"stages\[1\]\.conv2 must have x's torch\.float32, got torch\.float64",
        ),
        ((X.long(), 4, (STAGE, STAGE)), TypeError, r"x must be floating point, got torch\.int64"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        token_downsample(*arguments)
