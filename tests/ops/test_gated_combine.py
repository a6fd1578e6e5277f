"""gated_combine against a loop which adds one pair after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROUTINGS,
    assert_true_to,
    assert_within_budget,
    layer_norm,
    mask,
    padded_pairs,
    value_and_gradients,
)
from torch import Tensor

from mova_kernels import BackendError, RaggedPairs, _compiled, backends, use_backend
from mova_kernels.ops import gated_combine

pytestmark = pytest.mark.usefixtures("poisoned_memory")
RAW = torch.ops.mova_kernels

TOKENS, WIDTH, INNER = 3, 5, 4
MIXED = ROUTINGS["idle expert and sample without experts"]
routings = pytest.mark.parametrize("selected", ROUTINGS.values(), ids=ROUTINGS)
FORMS = {"exact": RaggedPairs.from_routing, "padded": padded_pairs}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every call of the test runs on it."""
    try:
        backends.choose("gated_combine", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))
    with use_backend(f"gated_combine={request.param}"):
        yield request.param


def problem(
    selected: Tensor, dtype: torch.dtype = torch.float64, tokens: int = TOKENS, width: int = WIDTH, inner: int = INNER
) -> list[Tensor]:
    """x, attended, gate, then three times each the norms' weights and biases, the weights and the biases."""
    num_pairs = int(selected.sum())
    shapes = [(len(selected), tokens, width), (num_pairs, tokens, inner), (num_pairs,)]
    shapes += [(inner,)] * 6 + [(width, inner)] * 3 + [(width,)] * 3
    return [torch.randn(shape).to(dtype) for shape in shapes]


def op(pairs: RaggedPairs):
    def function(x: Tensor, attended: Tensor, gate: Tensor, *parameters: Tensor) -> Tensor:
        padding = pairs.num_pairs - len(gate)
        attended = torch.cat([attended, attended.new_full((padding, *attended.shape[1:]), torch.nan)])
        gate = F.pad(gate, (0, padding))
        norms = list(zip(parameters[:3], parameters[3:6], strict=True))
        return gated_combine(x, attended, gate, pairs, norms, parameters[6:9], parameters[9:])

    return function


def loop(selected: Tensor, norm, linear):
    """Pairs sorted by expert, then by sample."""
    order = [(b, e) for e in range(3) for b in range(len(selected)) if selected[b, e]]

    def function(x: Tensor, attended: Tensor, gate: Tensor, *parameters: Tensor) -> Tensor:
        y = list(x)
        for p, (b, e) in enumerate(order):
            normed = norm(attended[p], parameters[e], parameters[3 + e])
            y[b] = y[b] + gate[p] * linear(normed, parameters[6 + e], parameters[9 + e])
        return torch.stack(y) if y else x * 1

    return function


def truth(selected: Tensor):
    return loop(selected, layer_norm, lambda x, w, b: (x[:, None] * w).sum(-1) + b)


def plain(selected: Tensor):
    return loop(selected, lambda x, w, b: F.layer_norm(x, w.shape, w, b), F.linear)


@routings
@forms
def test_reference_adds_one_pair_after_the_other(selected, form) -> None:
    assert_true_to(truth(selected), op(form(selected)), problem(selected))


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(form, dtype, backend) -> None:
    times = 1.5 if backend == "cpu" else 2
    assert_within_budget(truth(MIXED), op(form(MIXED)), plain(MIXED), lambda: problem(MIXED), dtype, times=times)


@routings
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget_of_every_routing(selected, form, dtype, backend) -> None:
    """With enough channels and tokens for whole vectors and rests, and for more than one part of the tokens."""
    draw = lambda: problem(selected, torch.float64, 67, 40, 69)  # noqa: E731
    times = 1.5 if backend == "cpu" else 2
    assert_within_budget(truth(selected), op(form(selected)), plain(selected), draw, dtype, 3, times)


@forms
def test_gradcheck(form) -> None:
    selected = mask("x.x", "..x")
    inputs = [t.requires_grad_() for t in problem(selected)]
    torch.autograd.gradcheck(op(form(selected)), inputs, fast_mode=True)  # 200 parameters


@forms
def test_sample_without_pairs_keeps_its_bits(form, backend) -> None:
    x, *others = problem(MIXED, torch.bfloat16)
    y = op(form(MIXED))(x, *others)
    assert torch.equal(y[1], x[1])
    assert not any(torch.equal(y[b], x[b]) for b in (0, 2, 3))


@forms
def test_x_stays_as_it_was(form, backend) -> None:
    x, *others = problem(MIXED, torch.float32)
    before = x.clone()
    op(form(MIXED))(x, *others)
    assert torch.equal(x, before)


def test_packed_or_dense_features_make_no_difference(backend) -> None:
    """Attended rows are numbered by pair, so where the features came from must not matter."""
    inputs = problem(MIXED, torch.float32)
    packed, dense = (op(RaggedPairs.from_routing(MIXED, [p] * 3))(*inputs) for p in (True, False))
    assert torch.equal(packed, dense)


def test_bf16_tokens_take_an_fp32_gate(backend) -> None:
    """The gate comes in fp32 from expert_gate whatever the tokens' dtype."""
    inputs = problem(MIXED, torch.bfloat16)
    inputs[2] = torch.rand(len(inputs[2]))
    assert op(RaggedPairs.from_routing(MIXED))(*inputs).dtype == torch.bfloat16


def test_a_pair_of_weight_zero_contributes_nothing() -> None:
    selected = mask("xx.", "x..")
    inputs = problem(selected)
    inputs[2] = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)  # pairs (0, 0), (1, 0), (0, 1)
    fewer = [inputs[0], inputs[1][:2], inputs[2][:2], *inputs[3:]]
    kept = RaggedPairs.from_routing(selected).topk(mask("x..", "x.."), 1)
    assert torch.equal(op(RaggedPairs.from_routing(selected))(*inputs), op(kept)(*fewer))


def test_compiled_graph_serves_every_routing(backend) -> None:
    torch._dynamo.reset()

    def function(selected: Tensor, attended: Tensor, gate: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        pairs = RaggedPairs.from_routing(selected)
        norms = list(zip(parameters[:3], parameters[3:6], strict=True))
        return gated_combine(x, attended, gate, pairs, norms, parameters[6:9], parameters[9:])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    for selected in (MIXED, MIXED.flip(0, 1), torch.zeros_like(MIXED)):
        x, attended, gate, *parameters = problem(selected, torch.float32)
        padding = selected.numel() - len(gate)
        wide = F.pad(attended, (0, 0, 0, 0, 0, padding), value=torch.nan), F.pad(gate, (0, padding))
        expected = value_and_gradients(lambda *t: function(selected, attended, gate, *t), [x, *parameters])  # noqa: B023
        found = value_and_gradients(lambda *t: compiled(selected, *wide, *t), [x, *parameters])  # noqa: B023
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(selected, *wide, x, *parameters), expected[0])


def test_strides_are_honoured(backend) -> None:
    inputs = problem(MIXED, torch.float32, 6, 8, 7)
    views = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t for t in inputs]
    views[1] = torch.cat([inputs[1], inputs[1]], 2)[..., :7]
    views[3] = torch.stack([inputs[3], inputs[3]], 1)[:, 0]
    function = op(RaggedPairs.from_routing(MIXED))
    torch.testing.assert_close(value_and_gradients(function, views), value_and_gradients(function, inputs))


def test_idle_experts_get_none(backend) -> None:
    leaves = [t.requires_grad_() for t in problem(MIXED, torch.float32)]
    op(RaggedPairs.from_routing(MIXED))(*leaves).sum().backward()
    assert [t.grad is not None for t in leaves[3:]] == MIXED.any(0).tolist() * 4


def test_padding_is_not_read_and_gets_no_gradient(backend) -> None:
    pairs = padded_pairs(MIXED)
    x, attended, gate, *parameters = problem(MIXED, torch.float32)
    padding = pairs.num_pairs - len(gate)
    attended = torch.cat([attended, attended.new_full((padding, TOKENS, INNER), torch.nan)]).requires_grad_()
    gate = F.pad(gate, (0, padding)).requires_grad_()
    norms = list(zip(parameters[:3], parameters[3:6], strict=True))
    y = gated_combine(x, attended, gate, pairs, norms, parameters[6:9], parameters[9:])
    assert y.isfinite().all()
    if backend == "cpu":  # NaN in the reference, where 0 * NaN never leaves the padding
        y.sum().backward()
        assert attended.grad[:-padding].all() and gate.grad[:-padding].all()
        assert not attended.grad[-padding:].any() and not gate.grad[-padding:].any()


def test_autocast_mixes_dtypes(backend) -> None:
    """fp32 tokens and parameters, bf16 attention; and the other way round."""
    for x_dtype, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, attended, *others = problem(MIXED, torch.float32, 5, 20, 33)
        leaves = [t.requires_grad_() for t in (x.to(x_dtype), attended.to(dtype), *others)]
        function = op(RaggedPairs.from_routing(MIXED))
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*leaves)
        assert y.dtype == x_dtype
        expected = truth(MIXED)(*(t.double() for t in leaves))
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.2)
        y.sum().backward()
        assert all(t.grad is None or t.grad.dtype == t.dtype for t in leaves)


@pytest.mark.skipif(_compiled.cpu_reason() is not None, reason=str(_compiled.cpu_reason()))
@pytest.mark.parametrize("name", ["no pair", "idle expert and sample without experts", "no sample"])
def test_opcheck(name) -> None:
    selected = ROUTINGS[name]
    pairs = RaggedPairs.from_routing(selected)
    x, attended, gate, *parameters = problem(selected, torch.float32)
    groups = [parameters[i : i + 3] for i in range(0, 12, 3)]
    groups[2] = [t.t().contiguous().t() for t in groups[2]]
    arguments = (attended, gate, list(pairs.tables), *groups, 1e-5, "cpu")
    torch.library.opcheck(RAW.gated_combine_fwd.default, (x, *arguments))
    torch.library.opcheck(RAW.gated_combine_bwd.default, (torch.randn_like(x), *arguments))


def test_auto_takes_what_was_compiled_for_this_processor(monkeypatch) -> None:
    def choose(dtype: torch.dtype, width: int = 4) -> str:
        return backends.choose("gated_combine", None, torch.device("cpu"), dtype, {"attended channels": width})

    monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
    wanted = {torch.float32: "cpu", torch.bfloat16: "cpu", torch.float16: "reference", torch.float64: "reference"}
    assert {dtype: choose(dtype) for dtype in wanted} == wanted
    assert choose(torch.float32, 8192) == "cpu" and choose(torch.float32, 8193) == choose(torch.float32, 0)
    assert choose(torch.float32, 0) == "reference"
    monkeypatch.setattr(_compiled, "cpu_reason", lambda: "it was never built")
    assert {choose(dtype) for dtype in wanted} == {"reference"}


PAIRS = RaggedPairs.from_routing(mask("x.", "xx"))
GOOD = {
    "x": torch.zeros(2, 3, 5),
    "attended": torch.zeros(3, 3, 4),
    "gate": torch.zeros(3),
    "pairs": PAIRS,
    "norms": [(torch.ones(4), torch.zeros(4))] * 2,
    "weights": [torch.zeros(5, 4)] * 2,
    "biases": [torch.zeros(5)] * 2,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got 'NoneType'"),
        ({"x": torch.zeros(2, 5)}, ValueError, r"x must have shape \(2, L, C\), got \(2, 5\)"),
        ({"x": torch.zeros(7, 3, 5)}, ValueError, r"x must have shape \(2, .*\), got \(7, 3, 5\)"),
        ({"attended": torch.zeros(2, 3, 4)}, ValueError, r"attended must have shape \(3, 3, I\), got \(2, 3, 4\)"),
        ({"attended": torch.zeros(3, 2, 4)}, ValueError, r"attended must have shape \(3, 3, I\), got \(3, 2, 4\)"),
        ({"gate": torch.zeros(2)}, ValueError, r"gate must have shape \(3\), got \(2,\)"),
        ({"norms": [(torch.ones(5), torch.zeros(5))] * 2}, ValueError, r"norms\[0\]\[0\] must have shape \(4\), got"),
        ({"weights": [torch.zeros(5, 3)] * 2}, ValueError, r"weights\[0\] must have shape \(5, 4\), got \(5, 3\)"),
        ({"weights": [torch.zeros(1, 4)] * 2}, ValueError, r"weights\[0\] must have shape \(5, 4\), got \(1, 4\)"),
        ({"biases": [torch.zeros(1)] * 2}, ValueError, r"biases\[0\] must have shape \(5\), got \(1,\)"),
    ],
)
def test_bad_input(change, error, message) -> None:
    with pytest.raises(error, match=message):
        gated_combine(**{**GOOD, **change})
