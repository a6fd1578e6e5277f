"""token_downsample against nn.Conv2d and nn.LayerNorm on images, with pooling windows written out."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_true_to, assert_within_budget, check_budget, value_and_gradients
from torch import Tensor, nn

from mova_kernels import BackendError, _compiled, backends, use_backend
from mova_kernels.ops import StageWeights, token_downsample

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTH = 8
SIDES = {"even": 4, "odd: windows overlap": 5, "smallest": 2, "3 to 1": 3}
sides = pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
PARAMETERS_PER_STAGE = 13


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        return backends.choose("token_downsample", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))


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
def test_error_budget(side, dtype, backend) -> None:
    truth = images(side)
    if backend == "reference":
        rival, times = truth, 2.0
    else:  # Convolutions of images sum in another order, which some processors' libraries do more exactly.
        rival, times = op(side, "reference"), 1.5
    assert_within_budget(truth, op(side, backend), rival, lambda: problem(side), dtype, draws=100, times=times)


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in problem(2)]
    torch.autograd.gradcheck(op(2), inputs, fast_mode=True)  # 500 parameters


def test_eps_is_that_of_all_norms(backend) -> None:
    """With a huge eps every LayerNorm gives its bias, and the whole op is the pooled sum of x and two biases."""
    x, *flat = problem(4, torch.float32)
    found = token_downsample(x, 4, (stage_weights(flat[:13]), stage_weights(flat[13:])), 1e30, backend=backend)
    expected = x.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2) + flat[12] + flat[25]
    torch.testing.assert_close(found, expected)


def test_mixed_precision_keeps_every_dtype(backend) -> None:
    """Norms may stay fp32 where convolutions are bf16."""
    inputs = [t.float() if i and i % 13 in (2, 3, 5, 6, 12, 0) else t for i, t in enumerate(problem(4, torch.bfloat16))]
    found = value_and_gradients(op(4, backend), inputs)
    assert [t.dtype for t in found] == [torch.bfloat16, *(t.dtype for t in inputs)]
    truth = value_and_gradients(images(4), [t.double() for t in inputs])
    plain = value_and_gradients(op(4, "reference"), inputs)
    check_budget("value", found[0], truth[0], plain[0])


def test_flat_weights_keep_their_order() -> None:
    flat = tuple(problem(2)[1:14])
    for weights in (stage_weights(flat), StageWeights.of(flat)):
        assert all(a is b for a, b in zip(weights.flat(), flat, strict=True))


def test_samples_do_not_see_each_other(backend) -> None:
    x, *flat = problem(5, torch.float32, num_samples=3)
    alone = op(5, backend)(x[1:2], *flat)
    x[0], x[2] = torch.nan, torch.inf
    torch.testing.assert_close(op(5, backend)(x, *flat)[1:2], alone)


def test_strides_are_honoured(backend) -> None:
    """Tokens may be a channel slice, or an image's channels moved last; weights need not be adjacent."""
    x, *flat = problem(4, torch.float32)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    expected = value_and_gradients(op(4, backend), [x, *flat])
    for view in (torch.cat([x, x], -1)[..., :WIDTH], x.transpose(1, 2).contiguous().transpose(1, 2)):
        close(value_and_gradients(op(4, backend), [view, *flat]), expected)
    sparse = [torch.stack([t, t], -1)[..., 0] for t in flat]
    close(value_and_gradients(op(4, backend), [x, *sparse]), expected)


def test_strided_gradients_are_honoured(backend) -> None:
    inputs, wide = problem(4, torch.float32), torch.randn(2, 4, 2 * WIDTH)
    for g in (wide[..., WIDTH:], torch.ones(()).expand(2, 4, WIDTH)):
        expected, found = (value_and_gradients(op(4, backend), inputs, t) for t in (g.clone(), g))
        torch.testing.assert_close(found, expected)


def test_no_sample(backend) -> None:
    x, *flat = problem(4, torch.float32)
    value, *gradients = value_and_gradients(op(4, backend), [x[:0], *flat])
    assert value.shape == (0, 4, WIDTH) and not any(g.any() for g in gradients)


def test_same_bits_every_time_and_without_gradients(backend) -> None:
    inputs = problem(5, torch.float32)
    first, second = (value_and_gradients(op(5, backend), inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(op(5, backend)(*inputs), first[0], rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [0, 1, 17], ids=["tokens", "first stage", "second stage"])
def test_only_some_inputs_need_gradients(wanted, backend) -> None:
    inputs = problem(2, torch.float32)
    expected = value_and_gradients(op(2, backend), inputs, torch.ones(2, 1, WIDTH))[1 + wanted]
    inputs[wanted].requires_grad_()
    (found,) = torch.autograd.grad(op(2, backend)(*inputs).sum(), inputs[wanted])
    torch.testing.assert_close(found, expected)


def test_one_compiled_graph_for_all_batch_sizes(backend) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op(4, backend), fullgraph=True, backend="aot_eager")
    x, *flat = (t.requires_grad_() for t in problem(4, torch.float32, num_samples=3))

    def outcome(function, num_samples: int) -> list[Tensor]:
        tokens = x[:num_samples].detach().requires_grad_()
        torch._dynamo.mark_dynamic(tokens, 0)
        y = function(tokens, *flat)
        return [y, *torch.autograd.grad(y.square().sum(), [tokens, *flat])]

    for num_samples in (2, 3):
        with torch.compiler.set_stance("fail_on_recompile" if num_samples > 2 else "default"):
            found = outcome(compiled, num_samples)
        torch.testing.assert_close(found, outcome(op(4, backend), num_samples))


def test_exported_program_is_bound_to_no_backend() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor, flat: list[Tensor]) -> Tensor:
            return op(4)(x, *flat)

    x, *flat = problem(4, torch.float32)
    program = torch.export.export(Module(), (x, flat))
    torch.testing.assert_close(program.module()(x, flat), Module()(x, flat))
    assert "token_downsample_stage_fwd" not in program.graph_module.code


def autocast(backend: str, dtype: torch.dtype = torch.bfloat16):
    def function(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return op(4, backend)(*inputs)

    return function


def test_autocast_keeps_tokens_and_gradients_wide(backend) -> None:
    """They are fp32 (the budget compares dtypes), and err as much as torch does under autocast."""
    draw = lambda: problem(4, torch.float32, 64)  # noqa: E731
    truth = images(4, 64)
    assert_within_budget(truth, autocast(backend), autocast("reference"), draw, torch.float32, draws=5, times=1.5)


needs_cpu_library = pytest.mark.skipif(_compiled.cpu_reason() is not None, reason=str(_compiled.cpu_reason()))


@needs_cpu_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["alone", "pooled, weights as under autocast"])
def test_opcheck(dtype) -> None:
    pool = dtype == torch.bfloat16
    x, *flat = problem(2, torch.float32)
    weights = [t.to(dtype) for t in flat[:13]]
    arguments = (x, weights, 2, 1e-5, pool, "cpu")
    torch.library.opcheck(torch.ops.mova_kernels.token_downsample_stage_fwd.default, arguments)
    out, *saved = torch.ops.mova_kernels.token_downsample_stage_fwd(*arguments)
    for of_weights in (False, True):
        arguments = (torch.randn_like(out), x, weights, saved, 2, 1e-5, pool, of_weights, "cpu")
        torch.library.opcheck(torch.ops.mova_kernels.token_downsample_stage_bwd.default, arguments)


@needs_cpu_library
def test_the_cpu_is_refused_with_a_reason() -> None:
    wide = [torch.zeros(1).expand([8196 if n == WIDTH else n for n in t.shape]) for t in problem(2, torch.float32)]
    with pytest.raises(BackendError, match="it takes channels up to 8192, not 8196"):
        op(2, "cpu")(*wide)
    with pytest.raises(BackendError, match=r"matrix products are in float32 and bfloat16, not in torch\.float16"):
        autocast("cpu", torch.float16)(*problem(4, torch.float32))
    with pytest.raises(BackendError, match=r"it takes float32 and bfloat16, not torch\.float64"):
        op(4, "cpu")(*problem(4))
    with use_backend("token_downsample=cpu"), pytest.raises(BackendError, match="cannot run token_downsample"):
        op(4)(*problem(4))


X, STAGE = torch.zeros(2, 16, WIDTH), stage_weights(tuple(problem(2, torch.float32)[1:14]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, 1, (STAGE, STAGE)), ValueError, "resolution must be at least 2, got 1"),
        ((X, 5, (STAGE, STAGE)), ValueError, r"x must have shape \(B, 25, C\), got \(2, 16, 8\)"),
        ((None, 4, (STAGE, STAGE)), TypeError, "x must be a tensor, got 'NoneType'"),
        ((X, 4, (STAGE,)), ValueError, "stages must be two, got 1"),
        ((X[..., :4], 4, (STAGE, STAGE)), ValueError, r"squeeze\[0\] must have shape \(S, 4, 1, 1\), got \(2, 8, "),
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
