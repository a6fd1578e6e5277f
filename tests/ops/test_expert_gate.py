"""expert_gate against an explicit softmax over the chosen subset, and against the official formula."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import assert_true_to, assert_within_budget, mask, value_and_gradients
from torch import Tensor

from mova_kernels import BackendError, _compiled, backends
from mova_kernels.ops import expert_gate

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# More than topk = 2, exactly topk, fewer, one, none.
SELECTED = mask("xxxx", "xxx.", ".xx.", "x...", "....")


@pytest.fixture(params=["reference", "cpu"])
def op(request: pytest.FixtureRequest) -> Callable[..., tuple[Tensor, Tensor]]:
    """expert_gate on each backend that has a CPU."""
    try:
        backends.choose("expert_gate", request.param, torch.device("cpu"), torch.float32)
    except BackendError as error:
        pytest.skip(str(error))
    return functools.partial(expert_gate, backend=request.param)


def weights_of(selected: Tensor, topk: int, op: Callable[..., tuple[Tensor, Tensor]] = expert_gate):
    return lambda logits: op(logits, selected, topk)[0]


def subset_softmax(selected: Tensor, topk: int):
    """Row by row: sort the selected experts, keep the best, exponentiate, divide by the sum."""

    def truth(logits: Tensor) -> Tensor:
        rows = []
        for row, chosen in zip(logits, selected, strict=True):
            experts = sorted(chosen.nonzero().flatten().tolist(), key=lambda e: -row[e].item())[:topk]
            total = sum(row[e].exp() for e in experts)
            rows.append(torch.stack([row[e].exp() / total if e in experts else 0 * row[e] for e in range(len(row))]))
        return torch.stack(rows)

    return truth


def official(selected: Tensor, topk: int):
    """Softmax over all experts with -1e6 for unselected ones, top-k, renormalisation."""

    def plain(logits: Tensor) -> Tensor:
        scores = (logits.float() + (1 - selected.float()) * -1e6).softmax(-1)
        kept = torch.zeros_like(scores).scatter(-1, scores.topk(min(topk, scores.shape[-1])).indices, 1.0)
        return scores * kept / (scores * kept).sum(-1, keepdim=True)

    return plain


TOPK = pytest.mark.parametrize("topk", [1, 2, 9], ids=["one", "some rows have more", "more than there are experts"])


@TOPK
def test_reference_is_the_softmax_over_the_best_selected(topk) -> None:
    assert_true_to(subset_softmax(SELECTED, topk), weights_of(SELECTED, topk), [torch.randn(5, 4, dtype=torch.float64)])


@TOPK
def test_gradcheck(topk) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(weights_of(SELECTED, topk), (logits,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(dtype, op) -> None:
    some = SELECTED[:-1]  # the official formula weighs experts which a sample without any did not select
    truth, plain = subset_softmax(some, 2), official(some, 2)
    assert_within_budget(truth, weights_of(some, 2, op), plain, lambda: [3 * torch.randn(4, 4)], dtype)


@pytest.mark.parametrize("topk", [1, 3, 7])
def test_weights_are_the_official_ones(topk, op) -> None:
    """T3: the official -1e6 makes unselected scores exactly 0, which leaves the same softmax, rounded elsewhere."""
    logits = 3 * torch.randn(4000, 7)
    selected = torch.rand(4000, 7) < 0.5
    selected[torch.arange(4000), torch.randint(7, (4000,))] = True
    weights, kept = op(logits, selected, topk)
    difference = (weights - official(selected, topk)(logits)).abs().max()
    assert difference <= 2e-7
    assert torch.equal(kept.sum(1), selected.sum(1).clamp(max=topk))


def test_kept_and_weights_belong_together(op) -> None:
    weights, kept = op(torch.randn(5, 4), SELECTED, 2)
    assert kept.dtype == torch.bool and weights.dtype == torch.float32
    assert not (kept & ~SELECTED).any()
    assert kept.sum(1).tolist() == [2, 2, 2, 1, 0]
    assert torch.equal(weights > 0, kept)
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1, 1, 1, 0]))


def test_equal_logits_share_equally(op) -> None:
    """The reference keeps those which topk takes, C++ those with the lowest indices."""
    logits = torch.zeros(3, 6)
    selected = mask("xxxxxx", "x.x.x.", ".....x")
    weights, kept = op(logits, selected, 2)
    chosen = torch.where(selected, logits, -torch.inf).topk(2).indices
    followed = selected & torch.zeros_like(selected).scatter(1, chosen, True)
    expected = {"reference": followed, "cpu": mask("xx....", "x.x...", ".....x")}[op.keywords["backend"]]
    assert torch.equal(kept, expected)
    assert torch.equal(weights, kept / kept.sum(1, keepdim=True))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_unselected_logits_change_nothing(poison, op) -> None:
    clean = torch.randn(5, 4)
    poisoned = torch.where(SELECTED, clean, poison)
    for a, b in zip(*(value_and_gradients(weights_of(SELECTED, 2, op), [x]) for x in (clean, poisoned)), strict=True):
        assert torch.equal(a, b)
        assert not b[~SELECTED].any()


def test_large_logits_do_not_overflow(op) -> None:
    weights, _ = op(torch.tensor([[3e38, 3e38, -3e38]]), mask("xxx"), 3)
    assert weights.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(("selected", "topk"), [(mask(".x..", "x..."), 3), (mask("xxxx", "xx.."), 1)])
def test_one_expert_has_weight_one_and_no_gradient(selected, topk, op) -> None:
    """T5: the only expert's logit cannot change its weight."""
    weights, grad = value_and_gradients(weights_of(selected, topk, op), [torch.randn(2, 4)])
    assert weights.sum(1).tolist() == [1.0, 1.0] and weights.max(1).values.tolist() == [1.0, 1.0]
    assert not grad.any()


def test_sample_without_experts_has_weight_and_gradient_zero(op) -> None:
    with torch.autograd.set_detect_anomaly(True):  # a NaN that a later torch.where hides would still stop people here
        weights, grad = value_and_gradients(weights_of(mask("...", "xx."), 2, op), [torch.randn(2, 3)])
    assert not weights[0].any() and not grad[0].any()
    assert grad[1].any() and grad.isfinite().all()


def test_gradients_where_the_gate_is_sure(op) -> None:
    """What fp32 inside would leave of them is noise."""
    logits = torch.tensor([[12.0, 0.0, -1.0, 3.0]])
    truth, found = (
        value_and_gradients(weights_of(mask("xxx."), 3, f), [x])
        for f, x in ((expert_gate, logits.double()), (op, logits))
    )
    torch.testing.assert_close(found, [t.float() for t in truth], rtol=1e-6, atol=0)


def test_compile(op) -> None:
    torch._dynamo.reset()
    logits = [torch.randn(5, 4)]
    compiled = torch.compile(weights_of(SELECTED, 2, op), fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(weights_of(SELECTED, 2, op), logits)
    torch.testing.assert_close(value_and_gradients(compiled, logits), expected)


def test_auto_takes_what_was_compiled_for_this_processor(monkeypatch) -> None:
    many = torch.zeros(1, 1025)
    for logits, expected in ((LOGITS, "cpu"), (LOGITS.bfloat16(), "cpu"), (many, "reference")):
        place = ("expert_gate", None, logits.device, logits.dtype, {"N": logits.shape[1]})
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
        assert backends.choose(*place) == expected
        monkeypatch.setattr(_compiled, "cpu_reason", lambda: "it was never built")
        assert backends.choose(*place) == "reference"
    monkeypatch.setattr(_compiled, "cpu_reason", lambda: None)
    with pytest.raises(BackendError, match=r"'cpu' cannot run expert_gate .*it takes N up to 1024, not 1025"):
        expert_gate(many, many > 0, 1, backend="cpu")


def test_no_sample(op) -> None:
    weights, kept = op(torch.randn(0, 4), torch.zeros(0, 4, dtype=torch.bool), 2)
    assert weights.shape == kept.shape == (0, 4)


LOGITS, ALL = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], ALL, 1), TypeError, "logits must be a tensor, got 'list'"),
        ((LOGITS[0], ALL, 1), ValueError, r"logits must have shape \(B, N\), got \(3,\)"),
        ((LOGITS, ALL[:, :2], 1), ValueError, r"selected must have shape \(2, 3\), got \(2, 2\)"),
        ((LOGITS, ALL.float(), 1), TypeError, r"selected must be bool, got torch\.float32"),
        ((LOGITS, ALL.to("meta"), 1), ValueError, r"selected must be on logits' cpu, got device\(type='meta'\)"),
        ((LOGITS, ALL, 0), ValueError, "topk must be at least 1, got 0"),
    ],
)
def test_bad_input(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        expert_gate(*arguments)
