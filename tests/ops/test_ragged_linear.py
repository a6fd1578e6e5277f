"""ragged_linear against a loop over the pairs, with host-known (exact) and unknown (padded) pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROUTINGS,
    assert_true_to,
    assert_within_budget,
    mask,
    padded_pairs,
    value_and_gradients,
)
from torch import Tensor

from mova_kernels import BackendError, RaggedPairs, _compiled, backends, use_backend
from mova_kernels.ops import ragged_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory")
RAW = torch.ops.mova_kernels

TOKENS, WIDTHS, OUTPUTS = 3, (5, 4, 7), (6, 2)  # every expert has its own width, every projection too
MIXED = ROUTINGS["idle expert and sample without experts"]
routings = pytest.mark.parametrize("selected", ROUTINGS.values(), ids=ROUTINGS)
FORMS = {"exact": RaggedPairs.from_routing, "padded": padded_pairs}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@dataclass
class Problem:
    """Tokens, affine parts, two projections with biases: as one flat list, for gradients of everything."""

    selected: Tensor
    packed: tuple[bool, ...] = (True, True, True)
    shared: bool = False  # all experts read the same tokens, as queries do
    tokens: int = TOKENS
    widths: tuple[int, ...] = WIDTHS
    outputs: tuple[int, ...] = OUTPUTS

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        widths = (self.widths[0],) * 3 if self.shared else self.widths
        counts = [int(n) if p else len(self.selected) for n, p in zip(self.selected.sum(0), self.packed, strict=True)]
        rows = [len(self.selected)] if self.shared else counts
        x = [torch.randn(r, self.tokens, c) for r, c in zip(rows, widths, strict=False)]
        affine = [1 + torch.randn(c) / 4 for c in widths] + [torch.randn(c) for c in widths]
        weights = [torch.randn(o, c) for o in self.outputs for c in widths]
        return [t.to(dtype) for t in (*x, *affine, *weights, *(torch.randn(o) for o in self.outputs for _ in widths))]

    def split(self, flat: tuple[Tensor, ...]):
        """x, (weight, bias) per expert, weights and biases per projection."""
        n = 1 if self.shared else 3
        x, (g, b, *rest) = flat[:n], [flat[i : i + 3] for i in range(n, len(flat), 3)]
        return x, list(zip(g, b, strict=True)), rest[:2], rest[2:]

    def op(self, pairs: RaggedPairs):
        """All outputs side by side, without padding; what is behind the last pair must be zeros."""

        def function(*flat: Tensor) -> Tensor:
            x, affines, weights, biases = self.split(flat)
            outputs = ragged_linear(x[0] if self.shared else x, pairs, affines, weights, biases)
            used = int(self.selected.sum())
            assert [o.shape for o in outputs] == [(pairs.num_pairs, self.tokens, o) for o in self.outputs]
            assert not any(o[used:].any() for o in outputs)
            return torch.cat(outputs, -1)[:used]

        return function

    def loop(self, linear):
        """One pair after the other, sorted by expert, in plain torch."""

        def function(*flat: Tensor) -> Tensor:
            x, affines, weights, biases = self.split(flat)
            found = [flat[0].new_zeros(0, self.tokens, sum(self.outputs))]
            for e in range(3):
                samples = self.selected[:, e].nonzero().flatten().tolist()
                for rank, sample in enumerate(samples):
                    source = x[0][sample] if self.shared else x[e][rank if self.packed[e] else sample]
                    scale, shift = affines[e]
                    outputs = [linear(source * scale + shift, w[e], b[e]) for w, b in zip(weights, biases, strict=True)]
                    found.append(torch.cat(outputs, -1)[None])
            return torch.cat(found)

        return function

    def truth(self):
        return self.loop(lambda x, w, b: (x[:, None] * w).sum(-1) + b)

    def plain(self):
        return self.loop(F.linear)


SOURCES = {
    "packed": {},
    "dense": {"packed": (False, False, False)},
    "packed and dense": {"packed": (True, False, True)},
    "shared tokens": {"shared": True},
}
sources = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every call of the test runs on it."""
    try:
        backends.choose("ragged_linear", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))
    with use_backend(f"ragged_linear={request.param}"):
        yield request.param


@routings
@sources
def test_exact_pairs_are_the_loop_over_pairs(selected, source) -> None:
    problem = Problem(selected, **source)
    pairs = RaggedPairs.from_routing(selected, problem.packed)
    assert_true_to(problem.truth(), problem.op(pairs), problem.inputs())


@sources
@pytest.mark.parametrize("name", ["no pair", "all pairs", "idle expert and sample without experts", "no sample"])
def test_padded_pairs_are_the_loop_over_pairs(name, source) -> None:
    problem = Problem(ROUTINGS[name], **source)
    pairs = padded_pairs(problem.selected, problem.packed)
    assert_true_to(problem.truth(), problem.op(pairs), problem.inputs())


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(form, dtype, backend) -> None:
    problem = Problem(MIXED)
    times = 1.5 if backend == "cpu" else 2
    assert_within_budget(problem.truth(), problem.op(form(MIXED)), problem.plain(), problem.inputs, dtype, times=times)


@routings
@sources
def test_error_budget_of_every_routing(selected, source, backend) -> None:
    """With enough channels and tokens for whole vectors and rests, and for more than one sum."""
    problem = Problem(selected, tokens=67, widths=(69, 36, 100), outputs=(40, 9), **source)
    pairs = RaggedPairs.from_routing(selected, problem.packed)
    times = 1.5 if backend == "cpu" else 2
    draw = lambda: problem.inputs(torch.float32)  # noqa: E731
    assert_within_budget(problem.truth(), problem.op(pairs), problem.plain(), draw, torch.float32, 3, times)


@forms
def test_gradcheck(form) -> None:
    problem = Problem(mask("x.x", "..x"))
    inputs = [t.requires_grad_() for t in problem.inputs()]
    torch.autograd.gradcheck(problem.op(form(problem.selected)), inputs, fast_mode=True)  # 200 parameters


@forms
@pytest.mark.parametrize("shared", [True, False], ids=["shared tokens", "dense"])
def test_unselected_rows_are_not_read(form, shared, backend) -> None:
    problem = Problem(MIXED, packed=(False, False, False), shared=shared)
    function = problem.op(form(MIXED, problem.packed))
    clean = problem.inputs(torch.float32)
    poisoned = [t.clone() for t in clean]
    idle = [~MIXED.any(1)] if shared else list(~MIXED.t())
    for x, rows in zip(poisoned, idle, strict=False):
        x[rows] = torch.nan
    expected, found = value_and_gradients(function, clean), value_and_gradients(function, poisoned)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(not gradient[rows].any() for gradient, rows in zip(found[1:], idle, strict=False))


def test_strides_are_honoured(backend) -> None:
    """Features are channel slices of one wide tensor, weights may be transposed views."""
    problem = Problem(MIXED, packed=(False, False, False))
    pairs = RaggedPairs.from_routing(MIXED, problem.packed)
    inputs = problem.inputs(torch.float32)
    widened = torch.cat(inputs[:3], -1)
    views = [*widened.split(WIDTHS, -1), *(t.t().contiguous().t() if t.dim() == 2 else t for t in inputs[3:])]
    for a, b in zip(*(value_and_gradients(problem.op(pairs), x) for x in (views, inputs)), strict=True):
        torch.testing.assert_close(a, b)


@forms
def test_autocast_casts_weights_and_keeps_gradients_wide(form, backend) -> None:
    problem = Problem(MIXED)
    function = problem.op(form(MIXED))

    def autocast(*flat: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*flat)

    value, *gradients = value_and_gradients(autocast, problem.inputs(torch.float32))
    assert value.dtype == torch.bfloat16
    assert {g.dtype for g in gradients} == {torch.float32}
    assert all(g.isfinite().all() for g in gradients)


@forms
def test_frozen_tokens_get_no_gradient(form) -> None:
    problem = Problem(MIXED)
    flat = problem.inputs()
    for t in flat[3:]:
        t.requires_grad_()
    problem.op(form(MIXED))(*flat).sum().backward()
    assert all(t.grad is None for t in flat[:3])
    assert flat[3].grad.any()


def raw_arguments(selected: Tensor):
    problem = Problem(selected)
    pairs = padded_pairs(selected)
    x, affines, weights, biases = problem.split(tuple(problem.inputs(torch.float32)))
    scale, shift = ([a[i] for a in affines] for i in (0, 1))
    weights, biases = [w for p in weights for w in p], [b for p in biases for b in p]
    arguments = [list(x), False, list(pairs.tables), scale, shift, weights, biases, [], []]
    grads = [torch.randn(pairs.num_pairs, TOKENS, o) for o in OUTPUTS]
    return arguments, grads


@pytest.mark.parametrize("name", ["no pair", "idle expert and sample without experts"])
def test_opcheck(name, backend) -> None:
    arguments, grads = raw_arguments(ROUTINGS[name])
    torch.library.opcheck(RAW.ragged_linear_fwd.default, (*arguments, torch.float32, backend))
    torch.library.opcheck(RAW.ragged_linear_bwd.default, (grads, *arguments, True, backend))
    torch.library.opcheck(RAW.ragged_linear_bwd.default, (grads, *arguments, False, backend))


@pytest.mark.parametrize("name", ["no pair", "idle expert and sample without experts"])
def test_raw_backward_has_the_promised_strides_for_transposed_operands(name, backend) -> None:
    """The fake promises contiguous gradients, also to an operand whose own strides are permuted."""
    arguments, grads = raw_arguments(ROUTINGS[name])
    arguments[0] = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in arguments[0]]
    arguments[5] = [t.t().contiguous().t() for t in arguments[5]]
    assert all(g.is_contiguous() for g in RAW.ragged_linear_bwd(grads, *arguments, True, backend))


def with_dense_features(selected: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
    problem = Problem(selected, packed=(False, False, False))
    pairs = RaggedPairs.from_routing(selected, problem.packed)
    x, affines, weights, biases = problem.split(flat)
    return ragged_linear(x, pairs, affines, weights, biases)


def dense_inputs() -> list[Tensor]:
    return Problem(MIXED, packed=(False, False, False)).inputs(torch.float32)


def test_compiled_graph_serves_every_routing(backend) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(with_dense_features, fullgraph=True, backend="aot_eager", dynamic=False)
    inputs = dense_inputs()
    for selected in (MIXED, MIXED.flip(0, 1), torch.zeros_like(MIXED)):
        used = int(selected.sum())
        expected, found = (
            value_and_gradients(lambda *flat: torch.cat(f(selected, *flat), -1)[:used], inputs)  # noqa: B023
            for f in (with_dense_features, compiled)
        )
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            outputs = compiled(selected, *inputs)
            torch.testing.assert_close([o[:used] for o in outputs], list(with_dense_features(selected, *inputs)))
        assert not any(o[used:].any() for o in outputs)


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed operands"])
def test_inductor_finds_the_promised_strides(transposed) -> None:
    """Only the op, as nothing else has to be compiled then; inductor asserts sizes and strides after each call."""
    problem = Problem(MIXED)
    pairs = padded_pairs(MIXED)
    inputs = problem.inputs(torch.float32)
    if transposed:
        inputs = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t for t in inputs]

    def function(*flat: Tensor) -> tuple[Tensor, ...]:
        x, affines, weights, biases = problem.split(flat)
        return ragged_linear(x, pairs, affines, weights, biases)

    compiled = torch.compile(function, fullgraph=True, backend="inductor", dynamic=False)
    expected, found = (
        value_and_gradients(lambda *flat: torch.cat(f(*flat), -1), inputs)  # noqa: B023
        for f in (function, compiled)
    )
    torch.testing.assert_close(found, expected)


def test_exported_program_serves_every_routing() -> None:
    class Module(torch.nn.Module):
        def forward(self, selected: Tensor, flat: list[Tensor]) -> tuple[Tensor, ...]:
            return with_dense_features(selected, *flat)

    inputs = dense_inputs()
    program = torch.export.export(Module(), (MIXED, inputs)).module()
    for selected in (MIXED, ROUTINGS["no pair"].new_zeros(4, 3), MIXED.flip(0)):
        used = int(selected.sum())
        outputs = program(selected, inputs)
        torch.testing.assert_close([o[:used] for o in outputs], list(with_dense_features(selected, *inputs)))


def test_idle_experts_get_none(backend) -> None:
    problem = Problem(MIXED)
    leaves = [t.requires_grad_() for t in problem.inputs(torch.float32)]
    problem.op(RaggedPairs.from_routing(MIXED))(*leaves).sum().backward()
    busy = MIXED.any(0).tolist()
    assert [t.grad is not None for t in leaves[3:]] == busy * (len(leaves[3:]) // 3)


def test_auto_takes_what_was_compiled_for_this_processor(monkeypatch) -> None:
    choose = lambda dtype: backends.choose("ragged_linear", None, torch.device("cpu"), dtype)  # noqa: E731
    monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
    wanted = {torch.float32: "cpu", torch.bfloat16: "cpu", torch.float16: "reference", torch.float64: "reference"}
    assert {dtype: choose(dtype) for dtype in wanted} == wanted
    monkeypatch.setattr(_compiled, "cpu_reason", lambda: "it was never built")
    assert {choose(dtype) for dtype in wanted} == {"reference"}


PAIRS = RaggedPairs.from_routing(mask("x.", "xx"))
GOOD = {
    "x": torch.randn(2, 3, 4),
    "pairs": PAIRS,
    "affines": [(torch.ones(4), torch.zeros(4))] * 2,
    "weights": [[torch.randn(5, 4)] * 2],
    "biases": [[torch.randn(5)] * 2],
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [torch.zeros(2, 3, 4)] * 3}, ValueError, "x must be one tensor or 2, got 3"),
        ({"x": [torch.zeros(2, 3, 4), None]}, TypeError, r"x\[1\] must be a tensor, got 'NoneType'"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must have shape \(2, .*, C\), got \(2, 4\)"),
        ({"x": torch.zeros(3, 3, 4)}, ValueError, r"x must have shape \(2, 3, C\), got \(3, 3, 4\)"),
        ({"x": [torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)]}, ValueError, r"x\[1\] must have shape \(R, 3, C\), got"),
        (
            {"affines": [(torch.ones(3), torch.zeros(4))] * 2},
            ValueError,
            r"affines\[0\]\[0\] must have shape \(4\), got",
        ),
        ({"affines": [(torch.ones(4), torch.zeros(1))] * 2}, ValueError, r"affines\[0\]\[1\] must have shape \(4\)"),
        (
            {"affines": GOOD["affines"][:1], "weights": [GOOD["weights"][0][:1]]},
            ValueError,
            "must have one entry for each of 2 experts, got {'affines': 1",
        ),
        (
            {"weights": [[torch.randn(5, 4)]]},
            ValueError,
            r"must have one entry for each of 2 experts, got .*'weights': \[1\]",
        ),
        (
            {"weights": [[torch.randn(5, 4), torch.randn(6, 4)]]},
            ValueError,
            r"weights\[0\]\[1\] must have shape \(5, 4\), got \(6, 4\)",
        ),
        ({"biases": [[torch.randn(1)] * 2]}, ValueError, r"biases\[0\]\[0\] must have shape \(5\), got \(1,\)"),
        (
            {"biases": [[torch.randn(5)]]},
            ValueError,
            r"must have one entry for each of 2 experts, got .*'biases': \[1\]",
        ),
    ],
)
def test_bad_input(change, error, message) -> None:
    with pytest.raises(error, match=message):
        ragged_linear(**{**GOOD, **change})
