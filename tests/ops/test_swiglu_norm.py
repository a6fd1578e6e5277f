"""swiglu_norm against its formula."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_true_to, assert_within_budget, layer_norm, value_and_gradients
from torch import Tensor, nn

from mova_kernels import BackendError, _compiled, backends
from mova_kernels.ops import swiglu_norm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {
    "usual": (2, 3, 21),  # 21 = int(8/3 * 8), and no multiple of a vector register
    "one channel is all mean": (1, 2, 1),
    "wider than one register row": (1, 1, 300),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(params=["reference", "cpu"])
def op(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """swiglu_norm on each backend that has a CPU."""
    try:
        backends.choose("swiglu_norm", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))
    return functools.partial(swiglu_norm, backend=request.param)


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
def test_error_budget(shape, dtype, op) -> None:
    assert_within_budget(truth, op, plain, lambda: problem(shape), dtype)


def test_gradcheck() -> None:
    torch.autograd.gradcheck(swiglu_norm, [t.requires_grad_() for t in problem((2, 2, 5))])


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_is_added_to_the_variance(eps, op) -> None:
    gate, up, weight, bias = problem((2, 3, 7), torch.float32)
    expected = layer_norm(gate / (1 + (-gate).exp()) * up, weight, bias, eps)
    torch.testing.assert_close(op(gate, up, weight, bias, eps), expected)


def test_mixed_precision_keeps_the_dtypes(op) -> None:
    """Under autocast the projections give bf16, the norm's parameters stay fp32."""
    gate, up, weight, bias = problem((2, 3, 7), torch.float32)
    found = value_and_gradients(op, [gate.bfloat16(), up.bfloat16(), weight, bias])
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_large_gates_do_not_overflow(op) -> None:
    _, *others = problem((1, 2, 5), torch.float32)
    gate = torch.tensor([-1e4, -100.0, 0, 100, 1e4]).expand(1, 2, 5).contiguous()
    assert all(part.isfinite().all() for part in value_and_gradients(op, [gate, *others]))


LAYOUTS = {
    "halves of one projection": lambda *t: torch.cat(t, -1).split(21, -1),
    "tokens first": lambda *t: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in t],
    "channels are not adjacent": lambda *t: [x.mT.contiguous().mT for x in t],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_honoured(layout, op) -> None:
    gate, up, *affine = problem((2, 3, 21), torch.float32)
    expected, found = (value_and_gradients(op, [*x, *affine]) for x in ([gate, up], LAYOUTS[layout](gate, up)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)], ids=["no sample", "no token"])
def test_nothing_to_do(shape, op) -> None:
    value, *gradients = value_and_gradients(op, problem(shape, torch.float32))
    assert value.shape == shape and not any(g.any() for g in gradients)


def test_padding_is_ignored(op) -> None:
    """It may be NaN; it gets zeros, and what counts is the same."""
    inputs = problem((2, 3, 21), torch.float32)
    padded = [F.pad(t, (0, 11), value=torch.nan) for t in inputs]
    expected = value_and_gradients(op, inputs, torch.ones(2, 3, 21))
    found = value_and_gradients(lambda *t: op(*t, channels=21), padded, torch.ones(2, 3, 32))
    torch.testing.assert_close([t[..., :21] for t in found], expected)
    assert not any(t[..., 21:].any() for t in found)


def test_compile(op) -> None:
    torch._dynamo.reset()
    inputs = problem((2, 3, 21), torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled, inputs), value_and_gradients(op, inputs))


def test_auto_takes_what_was_compiled_for_this_processor(monkeypatch) -> None:
    wide = torch.zeros(1, 1, 8193)
    for gate, expected in ((G, "cpu"), (G.bfloat16(), "cpu"), (G.double(), "reference"), (wide, "reference")):
        place = ("swiglu_norm", None, gate.device, gate.dtype, {"F": gate.shape[2]})
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
        assert backends.choose(*place) == expected
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: "it was never built")
        assert backends.choose(*place) == "reference"


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (torch.zeros(1, 1, 8193), "it takes F up to 8192, not 8193"),
        (torch.zeros(1, 1, 8).double(), "it takes float32 and bfloat16, not torch.float64"),
    ],
)
def test_cpu_is_refused_with_a_reason(gate, reason, monkeypatch) -> None:
    monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
    with pytest.raises(BackendError, match=f"'cpu' cannot run swiglu_norm .*{reason}"):
        swiglu_norm(gate, gate, gate[0, 0], gate[0, 0], backend="cpu")


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
