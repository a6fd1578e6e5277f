"""The Triton kernels of token_downsample in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import assert_within_budget, check_budget, cotangent_like, value_and_gradients
from test_token_downsample import images, op, problem, stage_weights
from torch import Tensor

from mova_kernels import BackendError, backends, use_backend
from mova_kernels.ops import token_downsample

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")


def small(side: int = 2, width: int = 8, num_samples: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return problem(side, dtype, width, num_samples)


# A tile is 2 or 4 tokens, so that the last one of an odd grid is cut. 64 channels fill a block, 48 do not.
@pytest.mark.parametrize(
    ("dtype", "side", "width"),
    [(torch.float32, 4, 48), (torch.bfloat16, 5, 48), (torch.float16, 4, 64)],
    ids=["float32, even", "bfloat16, odd", "float16, even"],
)
def test_error_budget(dtype, side, width) -> None:
    truth = images(side, width)
    assert_within_budget(truth, op(side, "triton"), truth, lambda: small(side, width), dtype)


@pytest.mark.parametrize("side", [2, 3, 5], ids=["smallest", "3 to 1", "5 to 2"])
def test_small_grids(side) -> None:
    inputs = small(side, num_samples=2 if side == 2 else 1)
    found, expected = (value_and_gradients(op(side, backend), inputs) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_programs_with_several_tiles(monkeypatch) -> None:
    """Two programs for each sample of nine tokens; the last one has tiles behind the end."""
    from mova_kernels.ops.token_downsample import triton_impl

    monkeypatch.setattr(triton_impl, "PROGRAMS", 4)
    monkeypatch.setattr(triton_impl, "TAPS_PROGRAMS", 4)
    inputs = small(3, num_samples=2)
    found, expected = (value_and_gradients(op(3, backend), inputs) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 3, 8])
def test_sums_are_small_beside_what_is_summed(num_samples) -> None:
    """At the official size, in bytes; the gradient of the taps, with nine sums, reads two tensors."""
    from mova_kernels.ops.token_downsample import triton_impl, triton_kernels

    for kernel, sums in ((triton_kernels.taps_grad_kernel, 9), (triton_kernels.conv_grad_kernel, 2)):
        steps, groups = triton_impl._split(kernel, num_samples, 48 * 48)
        assert steps * groups * triton_impl.TILES[kernel] >= 48 * 48
        assert groups * sums * 4 <= 0.6 * 2 * 48 * 48 * 2


def test_eps_is_that_of_all_norms() -> None:
    x, *flat = small()
    stages = stage_weights(tuple(flat[:13])), stage_weights(tuple(flat[13:]))
    found = token_downsample(x, 2, stages, 1e30, backend="triton")
    torch.testing.assert_close(found, token_downsample(x, 2, stages, 1e30, backend="reference"))


def test_samples_do_not_see_each_other() -> None:
    x, *flat = small(num_samples=3)
    alone = op(2, "triton")(x[1:2], *flat)
    x[0], x[2] = torch.nan, torch.inf
    torch.testing.assert_close(op(2, "triton")(x, *flat)[1:2], alone)


def test_strides_are_honoured() -> None:
    """Tokens may be a slice of channels, or those behind a class token; nothing need be adjacent."""
    x, *flat = small(num_samples=2)
    expected = value_and_gradients(op(2, "triton"), [x, *flat])
    for view in (torch.cat([x, x], -1)[..., :8], torch.cat([x[:, :1], x], 1)[:, 1:]):
        torch.testing.assert_close(op(2, "triton")(view, *flat), expected[0])
    sparse = [torch.stack([t, t], -1)[..., 0].requires_grad_() for t in flat]
    value = op(2, "triton")(x.mT.contiguous().mT, *sparse)
    found = torch.autograd.grad(value, sparse, cotangent_like(value))
    torch.testing.assert_close([value, *found], [expected[0], *expected[2:]])


@pytest.mark.parametrize(("side", "num_samples"), [(2, 2), (4, 1)], ids=["of samples", "of tokens"])
def test_strided_gradients_are_honoured(side, num_samples) -> None:
    inputs = small(side, num_samples=num_samples)
    wide = torch.randn(num_samples, side**2 // 4, 16)
    expected, found = (
        value_and_gradients(op(side, "triton"), inputs, g) for g in (wide[..., 8:].clone(), wide[..., 8:])
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_expanded_gradients_are_honoured() -> None:
    inputs, one = small(), torch.ones(())
    cotangents = one.repeat(1, 1, 8), one.expand(1, 1, 8)
    expected, found = (value_and_gradients(op(2, "triton"), inputs, g) for g in cotangents)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_sample() -> None:
    value, *gradients = value_and_gradients(op(2, "triton"), small(num_samples=0))
    assert value.shape == (0, 1, 8) and not any(g.any() for g in gradients)


def test_same_bits_every_time() -> None:
    inputs = small()
    first, second = (value_and_gradients(op(2, "triton"), inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_without_gradients_the_same_values() -> None:
    inputs = small()
    expected = op(2, "triton")(inputs[0].clone().requires_grad_(), *inputs[1:])
    torch.testing.assert_close(op(2, "triton")(*inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [0, 1, 17], ids=["tokens", "first stage", "second stage"])
def test_only_some_inputs_need_gradients(wanted) -> None:
    inputs = small()
    expected = value_and_gradients(op(2, "triton"), inputs, torch.ones(1, 1, 8))[1 + wanted]
    inputs[wanted].requires_grad_()
    (found,) = torch.autograd.grad(op(2, "triton")(*inputs).sum(), inputs[wanted])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_frozen_weights_cost_no_gradients(monkeypatch) -> None:
    from mova_kernels.ops.token_downsample import triton_impl

    monkeypatch.setattr(triton_impl, "_weight_grad", None)
    x, *flat = small()
    (found,) = torch.autograd.grad(op(2, "triton")(x.requires_grad_(), *flat).sum(), x)
    assert found.isfinite().all()


def test_mixed_precision_keeps_every_dtype() -> None:
    """Norms may stay fp32 where convolutions are bf16; they are then not rounded."""
    inputs = small(dtype=torch.bfloat16)
    inputs = [t.float() if i and i % 13 in (2, 3, 5, 6, 12, 0) else t for i, t in enumerate(inputs)]
    found = value_and_gradients(op(2, "triton"), inputs)
    assert [t.dtype for t in found] == [torch.bfloat16, *(t.dtype for t in inputs)]
    truth = value_and_gradients(images(2), [t.double() for t in inputs])
    plain = value_and_gradients(op(2, "reference"), inputs)
    check_budget("value", found[0], truth[0], plain[0])


def test_autocast_keeps_tokens_and_gradients_wide() -> None:
    """They are fp32 (the budget compares dtypes), and err as much as torch does under autocast."""

    def autocast(backend: str):
        def function(*inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return op(2, backend)(*inputs)

        return function

    draw = lambda: small(width=64)  # noqa: E731
    assert_within_budget(images(2, 64), autocast("triton"), autocast("reference"), draw, torch.float32, draws=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["alone", "pooled, weights as under autocast"])
def test_opcheck(dtype) -> None:
    pool = dtype == torch.bfloat16
    x, *flat = small()
    weights = [t.to(dtype) for t in flat[:13]]
    arguments = (x, weights, 2, 1e-5, pool, "triton")
    torch.library.opcheck(torch.ops.mova_kernels.token_downsample_stage_fwd.default, arguments)
    out, *saved = torch.ops.mova_kernels.token_downsample_stage_fwd(*arguments)
    for of_weights in (False, True):
        arguments = (torch.randn_like(out), x, weights, saved, 2, 1e-5, pool, of_weights, "triton")
        torch.library.opcheck(torch.ops.mova_kernels.token_downsample_stage_bwd.default, arguments)


def test_one_compiled_graph_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op(2, "triton"), fullgraph=True, backend="aot_eager")
    x, *flat = (t.requires_grad_() for t in small(num_samples=3))
    for num_samples in (2, 3):
        tokens = x[:num_samples].detach().requires_grad_()
        torch._dynamo.mark_dynamic(tokens, 0)
        with torch.compiler.set_stance("fail_on_recompile" if num_samples > 2 else "default"):
            found, expected = (value_and_gradient(f, tokens, flat) for f in (compiled, op(2, "triton")))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def value_and_gradient(function, tokens: Tensor, flat: list[Tensor]) -> tuple[Tensor, ...]:
    y = function(tokens, *flat)
    return y, *torch.autograd.grad(y.square().sum(), [tokens, *flat])


def test_too_many_channels_are_refused_with_a_reason() -> None:
    inputs = [torch.zeros(1).expand(t.shape) for t in small(width=2052)]
    with pytest.raises(BackendError, match="it takes channels up to 2048, not 2052"):
        op(2, "triton")(*inputs)


def test_wide_floats_are_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        op(2, "triton")(*small(dtype=torch.float64))
    assert backends.choose("token_downsample", None, torch.device("cpu"), torch.float32) != "triton"


def test_adapter() -> None:
    config = tiny.square_config(1, num_layers=1, resolution=2)
    base, experts, text = tiny.inputs(config, 2, ((1, 1),))
    routing = torch.tensor([[1], [0]]).bool()
    adapter = tiny.adapter(config)
    parameters = list(adapter.parameters())

    def outcome() -> list[Tensor]:
        y = adapter(base, experts, routing, text)
        return [y, *torch.autograd.grad(y, parameters, torch.ones_like(y), materialize_grads=True)]

    expected = outcome()
    with use_backend("token_downsample=triton"):
        torch.testing.assert_close(outcome(), expected, rtol=1e-4, atol=1e-5)
