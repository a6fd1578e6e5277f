"""The Triton kernels of expert_gate in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within_budget, mask, value_and_gradients
from test_expert_gate import SELECTED, TOPK, official, subset_softmax
from torch import Tensor

from mova_kernels import BackendError, backends
from mova_kernels.ops import expert_gate

pytestmark = [
    pytest.mark.usefixtures("triton_kernels", "poisoned_memory"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy's, about values that are not selected
]

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def op(selected: Tensor, topk: int):
    return lambda logits: expert_gate(logits, selected, topk, backend="triton")[0]


@TOPK
@DTYPES
def test_error_budget(topk, dtype) -> None:
    some = SELECTED[:-1]  # the official formula weighs experts which a sample without any did not select
    truth, function, plain = (f(some, topk) for f in (subset_softmax, op, official))
    assert_within_budget(truth, function, plain, lambda: [distinct(4, 4)], dtype)


def distinct(num_samples: int, num_experts: int) -> Tensor:
    """Logits no two of which are equal in a row, also after rounding: ties are a matter of their own."""
    order = torch.rand(num_samples, num_experts).argsort(1)
    return (order + torch.rand(num_samples, num_experts) / 2) * 8 / num_experts - 4


# samples, experts, topk
SHAPES = {
    "official": (20, 7, 3),
    "one expert": (4, 1, 1),
    "the block is full": (9, 8, 3),
    "many experts": (3, 256, 40),
    "topk beyond the experts": (9, 7, 300),
}


@pytest.mark.parametrize(("num_samples", "num_experts", "topk"), SHAPES.values(), ids=SHAPES)
def test_is_the_reference(num_samples, num_experts, topk) -> None:
    logits, selected = torch.randn(num_samples, num_experts), torch.rand(num_samples, num_experts) < 0.6
    weights, kept = expert_gate(logits, selected, topk, backend="triton")
    expected, expected_kept = expert_gate(logits, selected, topk, backend="reference")
    assert weights.dtype == torch.float32 and torch.equal(kept, expected_kept)
    torch.testing.assert_close(weights, expected, rtol=2e-7, atol=0)


def test_gradient_of_a_gate_that_is_sure_of_one_expert() -> None:
    """All of it cancels in fp32."""
    logits, selected = torch.tensor([[20.0, 0, -3, 1]]), mask("xxx.")
    reference = lambda logits: expert_gate(logits, selected, 3, backend="reference")[0]  # noqa: E731
    expected, found = (value_and_gradients(f, [logits])[1] for f in (reference, op(selected, 3)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_among_equals_the_lowest_index_wins() -> None:
    selected = mask("xxxxxx", "x.x.x.", ".....x", ".xxxxx")
    logits = torch.zeros(4, 6)
    logits[3, 4] = 1
    weights, kept = expert_gate(logits, selected, 2, backend="triton")
    assert torch.equal(kept, mask("xx....", "x.x...", ".....x", ".x..x."))
    assert weights[0].tolist() == weights[1, [0, 2, 1, 3, 4, 5]].tolist() == [0.5, 0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_unselected_logits_change_nothing(poison) -> None:
    clean = torch.randn(5, 4)
    poisoned = torch.where(SELECTED, clean, poison)
    for a, b in zip(*(value_and_gradients(op(SELECTED, 2), [x]) for x in (clean, poisoned)), strict=True):
        assert torch.equal(a, b)
        assert not b[~SELECTED].any()


def test_gradients_of_dropped_weights_change_nothing() -> None:
    logits = torch.randn(5, 4)
    _, kept = expert_gate(logits, SELECTED, 2, backend="triton")
    cotangent = torch.randn(5, 4)
    poisoned = torch.where(kept, cotangent, torch.nan)
    expected, found = (value_and_gradients(op(SELECTED, 2), [logits], g)[1] for g in (cotangent, poisoned))
    assert torch.equal(found, expected) and not found[~kept].any()


def test_nan_of_a_selected_expert_keeps_no_more_than_topk() -> None:
    logits = torch.tensor([[torch.nan, 1, 2, 3], [0, torch.nan, torch.nan, torch.nan]])
    weights, kept = expert_gate(logits, mask("xxxx", "xxxx"), 2, backend="triton")
    assert kept.sum(1).tolist() == [2, 2]
    assert torch.equal(weights.isnan(), kept)


def test_large_logits_do_not_overflow() -> None:
    weights = op(mask("xxx"), 3)(torch.tensor([[3e38, 3e38, -3e38]]))
    assert weights.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize(("selected", "topk"), [(mask(".x..", "x..."), 3), (mask("xxxx", "xx.."), 1)])
def test_one_expert_has_weight_one_and_no_gradient(selected, topk) -> None:
    weights, grad = value_and_gradients(op(selected, topk), [torch.randn(2, 4)])
    assert weights.sum(1).tolist() == [1.0, 1.0] and weights.max(1).values.tolist() == [1.0, 1.0]
    assert not grad.any()


def test_sample_without_experts_has_weight_and_gradient_zero() -> None:
    weights, grad = value_and_gradients(op(mask("...", "xx."), 2), [torch.randn(2, 3)])
    assert not weights[0].any() and not grad[0].any()
    assert grad[1].any() and grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=["no sample", "no expert"])
def test_nothing_to_do(shape) -> None:
    weights, grad = value_and_gradients(op(torch.zeros(shape, dtype=torch.bool), 2), [torch.randn(shape)])
    assert weights.shape == grad.shape == shape


def test_strides_are_honoured() -> None:
    """Also those of the routing and of the gradient, which may be expanded."""
    logits, cotangent = torch.randn(2, 5, 4)
    expected = value_and_gradients(op(SELECTED, 2), [logits], cotangent)
    wide = torch.full((5, 10), torch.nan)
    wide[:, 1:9:2] = logits
    selected, cotangent = (t.mT.contiguous().mT for t in (SELECTED, cotangent))
    value, grad = value_and_gradients(lambda wide: op(selected, 2)(wide[:, 1:9:2]), [wide], cotangent)
    torch.testing.assert_close([value, grad[:, 1:9:2]], expected, rtol=0, atol=0)
    row, same = torch.randn(1, 4), mask("xx.x").expand(5, 4)
    expected = value_and_gradients(op(same.contiguous(), 2), [logits], row.expand(5, 4).contiguous())
    torch.testing.assert_close(value_and_gradients(op(same, 2), [logits], row.expand(5, 4)), expected, rtol=0, atol=0)


def test_strides_of_kept_are_honoured() -> None:
    logits, grad = torch.randn(2, 5, 4)
    _, kept = expert_gate(logits, SELECTED, 2, backend="triton")
    backward = torch.ops.mova_kernels.expert_gate_bwd
    expected, found = (backward(grad, logits, k, "triton") for k in (kept, kept.mT.contiguous().mT))
    assert torch.equal(found, expected)


def test_same_bits_every_time() -> None:
    logits = torch.randn(5, 4)
    first, second = (value_and_gradients(op(SELECTED, 2), [logits]) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@DTYPES
def test_opcheck(dtype) -> None:
    logits = torch.randn(5, 4).to(dtype)
    arguments = (logits, SELECTED, 2, "triton")
    torch.library.opcheck(torch.ops.mova_kernels.expert_gate_fwd.default, arguments)
    weights, kept = torch.ops.mova_kernels.expert_gate_fwd(*arguments)
    arguments = (torch.randn_like(weights), logits, kept, "triton")
    torch.library.opcheck(torch.ops.mova_kernels.expert_gate_bwd.default, arguments)


def test_compile() -> None:
    logits = torch.randn(5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(op(SELECTED, 2), fullgraph=True, backend="aot_eager")
    expected, found = (value_and_gradients(f, [logits]) for f in (op(SELECTED, 2), compiled))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_too_many_experts_are_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"cannot run expert_gate .* it takes N up to 1024, not 1025"):
        op(torch.ones(1, 1025, dtype=torch.bool), 2)(torch.zeros(1, 1025))
    assert backends.choose("expert_gate", None, torch.device("cpu"), torch.float32) != "triton"


def test_wide_floats_are_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        op(SELECTED, 2)(torch.zeros(5, 4, dtype=torch.float64))
