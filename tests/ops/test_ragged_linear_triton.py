"""The Triton kernels of ragged_linear in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import ROUTINGS, assert_within_budget, mask, padded_pairs, value_and_gradients
from test_ragged_linear import MIXED, OUTPUTS, TOKENS, WIDTHS, Problem, forms, routings, sources
from torch import Tensor

from mova_kernels import BackendError, RaggedPairs, use_backend
from mova_kernels.ops import ragged_linear

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory", "on_triton")
RAW = torch.ops.mova_kernels


@pytest.fixture
def on_triton() -> Iterator[None]:
    with use_backend("ragged_linear=triton"):
        yield


@routings
@sources
def test_it_agrees_with_the_reference(selected, source) -> None:
    problem = Problem(selected, **source)
    agrees(problem, RaggedPairs.from_routing(selected, problem.packed))


@sources
@pytest.mark.parametrize("name", ["no pair", "all pairs", "idle expert and sample without experts", "no sample"])
def test_padded_it_agrees_with_the_reference(name, source) -> None:
    problem = Problem(ROUTINGS[name], **source)
    agrees(problem, padded_pairs(problem.selected, problem.packed))


def agrees(problem: Problem, pairs: RaggedPairs) -> None:
    inputs = problem.inputs(torch.float32)
    found = value_and_gradients(problem.op(pairs), inputs)
    with use_backend("ragged_linear=reference"):
        expected = value_and_gradients(problem.op(pairs), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# All fp32 tiles are full; all are cut, and so are steps of the loops; 16-bit tiles are cut, too.
SIZES = {
    "full tiles": {"tokens": 128, "widths": (128, 256, 128), "outputs": (128, 128)},
    "cut tiles": {"tokens": 70, "widths": (72, 40, 130), "outputs": (66, 34)},
    "one token": {"tokens": 1, "widths": (16, 8, 24), "outputs": (8, 8)},
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("shared", [False, True], ids=["own tokens", "shared tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(size, shared, dtype) -> None:
    """Two experts with two samples each, so that gradients are sums; one without any."""
    selected = mask("xx.", "...", "xx.")
    problem = Problem(selected, shared=shared, **size)
    pairs = RaggedPairs.from_routing(selected)
    assert_within_budget(problem.truth(), problem.op(pairs), problem.plain(), problem.inputs, dtype, draws=3)


@pytest.mark.usefixtures("compiled")
def test_official_keys_and_values_of_one_expert() -> None:
    """The truth is plain torch in fp64: explicit sums would not fit into memory."""
    selected = mask("x..")
    problem = Problem(selected, tokens=48 * 48, widths=(1536, 16, 16), outputs=(1024, 1024))
    function, plain = problem.op(RaggedPairs.from_routing(selected)), problem.plain()
    assert_within_budget(plain, function, plain, problem.inputs, torch.bfloat16, draws=1)


@forms
def test_nothing_unselected_is_read(form) -> None:
    """Rows, and all parameters of an expert that nobody selected."""
    selected = mask("x..", "...", "x.x")
    problem = Problem(selected, packed=(False, False, False))
    function = problem.op(form(selected, problem.packed))
    clean = problem.inputs(torch.float32)
    poisoned = [t.clone() for t in clean]
    for e in range(3):
        poisoned[e][~selected[:, e]] = torch.nan
    for parameter in poisoned[4::3]:  # of the second expert, which nobody selected
        parameter.fill_(torch.nan)
    expected, found = value_and_gradients(function, clean), value_and_gradients(function, poisoned)
    torch.testing.assert_close([found[0], *found[1:4]], [expected[0], *expected[1:4]], rtol=0, atol=0)
    for e, gradient in enumerate(found[1:4]):
        assert not gradient[~selected[:, e]].any()


def test_strides_are_honoured() -> None:
    """Features are slices of one wide tensor, weights are transposed, gradients are slices and expanded scalars."""
    problem = Problem(MIXED, packed=(False, False, False))
    pairs = RaggedPairs.from_routing(MIXED, problem.packed)
    inputs = problem.inputs(torch.float32)
    widened = torch.cat(inputs[:3], -1).transpose(0, 1).contiguous().transpose(0, 1)
    views = [*widened.split(WIDTHS, -1), *(t.t().contiguous().t() if t.dim() == 2 else t for t in inputs[3:])]
    found, expected = (value_and_gradients(problem.op(pairs), x) for x in (views, inputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    def gradients(summed: bool) -> list[Tensor]:
        x, affines, weights, biases = problem.split(tuple(t.requires_grad_() for t in problem.inputs(torch.float32)))
        outputs = ragged_linear(x, pairs, affines, weights, biases)
        y = sum(o.sum() for o in outputs) if summed else torch.cat(outputs, -1)
        return list(torch.autograd.grad(y, x, None if summed else torch.ones_like(y)))

    for inputs_of in (False, True):
        torch.manual_seed(1)
        found = gradients(inputs_of)
        torch.manual_seed(1)
        torch.testing.assert_close(found, gradients(not inputs_of), rtol=0, atol=0)


def test_experts_may_differ_in_dtype() -> None:
    problem = Problem(MIXED)
    pairs, inputs = RaggedPairs.from_routing(MIXED), problem.inputs(torch.float32)
    for i in range(10, len(inputs), 3):  # weights and biases of the second expert
        inputs[i] = inputs[i].half()
    found = value_and_gradients(problem.op(pairs), inputs)
    with use_backend("ragged_linear=reference"):
        expected = value_and_gradients(problem.op(pairs), inputs)
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_same_bits_every_time() -> None:
    problem = Problem(MIXED)
    inputs, function = problem.inputs(torch.float32), problem.op(RaggedPairs.from_routing(MIXED))
    first, second = (value_and_gradients(function, inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_without_biases() -> None:
    problem = Problem(MIXED)
    pairs = RaggedPairs.from_routing(MIXED)
    x, affines, weights, biases = problem.split(tuple(problem.inputs(torch.float32)))
    zeros = [[torch.zeros_like(b) for b in projection] for projection in biases]
    found, expected = ragged_linear(x, pairs, affines, weights), ragged_linear(x, pairs, affines, weights, zeros)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_updated_weights_are_noticed() -> None:
    """Nothing that was folded before may be used again."""
    problem = Problem(MIXED)
    pairs = RaggedPairs.from_routing(MIXED)
    x, affines, weights, _ = problem.split(tuple(problem.inputs(torch.float32)))
    before = ragged_linear(x, pairs, affines, weights)
    for w in (*weights[0], *weights[1]):
        w.mul_(2)
    after = ragged_linear(x, pairs, [(g, b) for g, b in affines], weights)
    torch.testing.assert_close(after, tuple(2 * y for y in before), rtol=1e-5, atol=1e-5)


def test_idle_experts_get_no_gradient() -> None:
    selected = mask("x..", "x.x")
    problem = Problem(selected)
    flat = [t.requires_grad_() for t in problem.inputs(torch.float32)]
    problem.op(RaggedPairs.from_routing(selected))(*flat).sum().backward()
    assert [t.grad is None for t in flat[3:]] == [False, True, False] * 6


def test_frozen_tokens_get_no_gradient() -> None:
    problem = Problem(MIXED)
    flat = problem.inputs(torch.float32)
    for t in flat[3:]:
        t.requires_grad_()
    problem.op(RaggedPairs.from_routing(MIXED))(*flat).sum().backward()
    assert all(t.grad is None for t in flat[:3])
    assert flat[3].grad.any()


def test_autocast_folds_wide_weights_into_narrow_ones() -> None:
    problem = Problem(MIXED)
    function = problem.op(RaggedPairs.from_routing(MIXED))

    def autocast(*flat: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*flat)

    inputs = problem.inputs(torch.float32)
    value, *gradients = value_and_gradients(autocast, inputs)
    assert value.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}
    torch.testing.assert_close(value.float(), function(*inputs), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared) -> None:
    selected = mask("x.x", "..x")
    problem = Problem(selected, shared=shared)
    pairs = padded_pairs(selected)
    x, affines, weights, biases = problem.split(tuple(problem.inputs(torch.float32)))
    scale, shift = ([a[i] for a in affines] for i in (0, 1))
    weights, biases = ([t for projection in p for t in projection] for p in (weights, biases))
    arguments = (list(x), shared, list(pairs.tables), scale, shift, weights, biases, [], [])
    torch.library.opcheck(RAW.ragged_linear_fwd.default, (*arguments, torch.float32, "triton"))
    grads = [torch.randn(pairs.num_pairs, TOKENS, o) for o in OUTPUTS]
    torch.library.opcheck(RAW.ragged_linear_bwd.default, (grads, *arguments, True, "triton"))
    torch.library.opcheck(RAW.ragged_linear_bwd.default, (grads, *arguments, False, "triton"))


def test_compiled_graph_serves_every_routing() -> None:
    def function(selected: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        problem = Problem(selected, packed=(False, False, False))
        pairs = RaggedPairs.from_routing(selected, problem.packed)
        x, affines, weights, biases = problem.split(flat)
        return ragged_linear(x, pairs, affines, weights, biases)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    inputs = Problem(MIXED, packed=(False, False, False)).inputs(torch.float32)
    for selected in (MIXED, MIXED.flip(0, 1), torch.zeros_like(MIXED)):
        used = int(selected.sum())
        expected, found = (
            value_and_gradients(lambda *flat: torch.cat(f(selected, *flat), -1)[:used], inputs)  # noqa: B023
            for f in (function, compiled)
        )
        torch.testing.assert_close(found, expected)


def test_wide_floats_are_refused_with_a_reason() -> None:
    problem = Problem(MIXED)
    with pytest.raises(
        BackendError, match=r"ragged_linear .* it takes float32, bfloat16 and float16, not torch\.float64"
    ):
        problem.op(RaggedPairs.from_routing(MIXED))(*problem.inputs())
