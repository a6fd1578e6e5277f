"""swiglu_norm against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_true_to, assert_within_budget, layer_norm, value_and_gradients
from torch import Tensor, nn

from mova_kernels.ops import swiglu_norm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {
    "usual": (2, 3, 21),  # 21 = int(8/3 * 8), and no multiple of a vector register
    "one channel is all mean": (1, 2, 1),
    "wider than one register row": (1, 1, 300),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def problem(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """gate, up, weight, bias."""
    gate, up = torch.randn(2, *shape)
    weight, bias = torch.randn(2, shape[2])
    return [t.to(dtype) for t in (gate, up, 1 + weight / 4, bias)]


def truth(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(gate / (1 + (-gate).exp()) * up, weight, bias)


def plain(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    norm = nn.LayerNorm(weight.shape[0], 1e-5, dtype=gate.dtype)
    return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, nn.SiLU()(gate) * up)


@shapes
def test_reference_is_the_formula(shape) -> None:
    assert_true_to(truth, swiglu_norm, problem(shape))


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(shape, dtype) -> None:
    assert_within_budget(truth, swiglu_norm, plain, lambda: problem(shape), dtype)


def test_gradcheck() -> None:
    torch.autograd.gradcheck(swiglu_norm, [t.requires_grad_() for t in problem((2, 2, 5))])


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_is_added_to_the_variance(eps) -> None:
    gate, up, weight, bias = problem((2, 3, 7))
    expected = layer_norm(gate / (1 + (-gate).exp()) * up, weight, bias, eps)
    torch.testing.assert_close(swiglu_norm(gate, up, weight, bias, eps), expected)


def test_mixed_precision_keeps_the_tokens_dtype() -> None:
    """Under autocast the projections give bf16, the norm's parameters stay fp32."""
    gate, up, weight, bias = problem((2, 3, 7), torch.float32)
    assert swiglu_norm(gate.bfloat16(), up.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_large_gates_do_not_overflow() -> None:
    _, *others = problem((1, 2, 5), torch.float32)
    gate = torch.tensor([-1e4, -100.0, 0, 100, 1e4]).expand(1, 2, 5)
    assert swiglu_norm(gate, *others).isfinite().all()


def test_strides_are_honoured() -> None:
    """Gate and up may be the halves of one projection."""
    gate, up, *affine = problem((2, 3, 21))
    halves = torch.cat([gate, up], -1).split(21, -1)
    expected, found = (value_and_gradients(swiglu_norm, x) for x in ([gate, up, *affine], [*halves, *affine]))
    torch.testing.assert_close(found, expected)


def test_no_sample() -> None:
    value, *gradients = value_and_gradients(swiglu_norm, problem((0, 3, 7)))
    assert value.shape == (0, 3, 7) and not any(g.any() for g in gradients)


def test_padding_is_ignored() -> None:
    """It may be NaN; it gets zeros, and what counts is the same."""
    inputs = problem((2, 3, 21))
    padded = [F.pad(t, (0, 11), value=torch.nan) for t in inputs]
    expected = value_and_gradients(swiglu_norm, inputs, torch.ones(2, 3, 21))
    found = value_and_gradients(lambda *t: swiglu_norm(*t, channels=21), padded, torch.ones(2, 3, 32))
    torch.testing.assert_close([t[..., :21] for t in found], expected)
    assert not any(t[..., 21:].any() for t in found)


@pytest.mark.parametrize("channels", [-1, 5])
def test_channels_beyond_the_tensors_are_refused(channels) -> None:
    with pytest.raises(ValueError, match=f"channels must be from 0 to 4, got {channels}"):
        swiglu_norm(G, G, W, W, channels=channels)


G, W = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, G, W, W), TypeError, "gate must be a tensor, got 'NoneType'"),
        ((G[0], G, W, W), ValueError, r"gate must have shape \(B, L, F\), got \(3, 4\)"),
        ((G, G[:1], W, W), ValueError, r"up must have shape \(2, 3, 4\), got \(1, 3, 4\)"),
        ((G, G, W[:1], W), ValueError, r"weight must have shape \(4\), got \(1,\)"),
        ((G, G, W, W[:3]), ValueError, r"bias must have shape \(4\), got \(3,\)"),
        ((G.long(), G, W, W), TypeError, r"gate must be floating point, got torch\.int64"),
        ((G, G, W, W.to("meta")), ValueError, r"bias must be on gate's cpu, got device\(type='meta'\)"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        swiglu_norm(*arguments)
