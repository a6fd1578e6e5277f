"""The Triton kernels of gated_combine in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget, mask, padded_pairs, value_and_gradients
from test_gated_combine import INNER, MIXED, WIDTH, forms, op, plain, problem, routings, truth
from torch import Tensor

from mova_kernels import BackendError, RaggedPairs, use_backend
from mova_kernels.ops import gated_combine

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory", "on_triton")
RAW = torch.ops.mova_kernels


@pytest.fixture
def on_triton() -> Iterator[None]:
    with use_backend("gated_combine=triton"):
        yield


@routings
@forms
def test_it_agrees_with_the_reference(selected, form) -> None:
    """What is behind the last pair is NaN (see op())."""
    pairs, inputs = form(selected), problem(selected, torch.float32)
    found = value_and_gradients(op(pairs), inputs)
    with use_backend("gated_combine=reference"):
        expected = value_and_gradients(op(pairs), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# tokens, width of x, width of what attention found
SIZES = {"full tiles": (128, 128, 256), "cut tiles": (70, 66, 72), "one token": (1, 8, 16)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(size, dtype) -> None:
    selected = mask("xx.", "...", ".x.")
    pairs = RaggedPairs.from_routing(selected)
    draw = lambda: problem(selected, torch.float64, *size)  # noqa: E731
    assert_within_budget(truth(selected), op(pairs), plain(selected), draw, dtype, draws=3)


@pytest.mark.usefixtures("compiled")
def test_official_pair() -> None:
    """The truth is plain torch in fp64: explicit sums would not fit into memory."""
    selected = mask("x..")
    function, by_torch = op(RaggedPairs.from_routing(selected)), plain(selected)
    draw = lambda: problem(selected, torch.float64, 48 * 48, 1024, 1024)  # noqa: E731
    assert_within_budget(by_torch, function, by_torch, draw, torch.bfloat16, draws=1)


@forms
def test_sample_without_pairs_keeps_its_bits(form) -> None:
    x, *others = problem(MIXED, torch.bfloat16)
    y = op(form(MIXED))(x, *others)
    assert torch.equal(y[1], x[1])
    assert not any(torch.equal(y[b], x[b]) for b in (0, 2, 3))


def test_a_gate_of_zero_still_has_a_gradient() -> None:
    """The normalised tokens must not be recovered by dividing by the gate."""
    inputs = problem(MIXED, torch.float32)
    inputs[2].zero_()
    pairs = RaggedPairs.from_routing(MIXED)
    found = value_and_gradients(op(pairs), inputs)
    with use_backend("gated_combine=reference"):
        expected = value_and_gradients(op(pairs), inputs)
    assert found[3].abs().min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_strides_are_honoured() -> None:
    pairs, inputs = RaggedPairs.from_routing(MIXED), problem(MIXED, torch.float32)
    expected = value_and_gradients(op(pairs), inputs)
    wide = [torch.cat([t, t], -1).transpose(0, 1).contiguous().transpose(0, 1) for t in inputs[:2]]
    views = [wide[0][..., :WIDTH], wide[1][..., :INNER], *inputs[2:]]
    views[9:12] = [w.t().contiguous().t() for w in inputs[9:12]]
    torch.testing.assert_close(value_and_gradients(op(pairs), views), expected, rtol=0, atol=0)


def test_same_bits_every_time() -> None:
    pairs, inputs = RaggedPairs.from_routing(MIXED), problem(MIXED, torch.float32)
    first, second = (value_and_gradients(op(pairs), inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_idle_experts_get_no_gradient() -> None:
    selected = mask("x..", "x.x")
    inputs = [t.requires_grad_() for t in problem(selected, torch.float32)]
    op(RaggedPairs.from_routing(selected))(*inputs).sum().backward()
    assert [t.grad is None for t in inputs[3:]] == [False, True, False] * 4


def test_wide_residual_with_narrow_experts() -> None:
    """As under autocast: tokens and parameters in fp32, what attention found in bf16."""
    x, attended, *others = problem(MIXED, torch.float32)
    pairs = RaggedPairs.from_routing(MIXED)
    value, *gradients = value_and_gradients(op(pairs), [x, attended.bfloat16(), *others])
    assert value.dtype == torch.float32
    assert [g.dtype for g in gradients[:3]] == [torch.float32, torch.bfloat16, torch.float32]
    expected = value_and_gradients(op(pairs), [x, attended, *others])
    torch.testing.assert_close(value, expected[0], rtol=0.02, atol=0.05)


def test_opcheck() -> None:
    selected = mask("x.x", "..x")
    pairs = padded_pairs(selected)
    x, attended, gate, *parameters = problem(selected, torch.float32)
    padding = pairs.num_pairs - len(gate)
    attended, gate = F.pad(attended, (0, 0, 0, 0, 0, padding)), F.pad(gate, (0, padding))
    arguments = (attended, gate, list(pairs.tables), *(parameters[i : i + 3] for i in range(0, 12, 3)), 1e-5, "triton")
    torch.library.opcheck(RAW.gated_combine_fwd.default, (x, *arguments))
    torch.library.opcheck(RAW.gated_combine_bwd.default, (torch.randn_like(x), *arguments))


def test_compiled_graph_serves_every_routing() -> None:
    def function(selected: Tensor, attended: Tensor, gate: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        pairs = RaggedPairs.from_routing(selected)
        norms = list(zip(parameters[:3], parameters[3:6], strict=True))
        return gated_combine(x, attended, gate, pairs, norms, parameters[6:9], parameters[9:])

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    for selected in (MIXED, MIXED.flip(0, 1), torch.zeros_like(MIXED)):
        x, attended, gate, *parameters = problem(selected, torch.float32)
        padding = selected.numel() - len(gate)
        wide = F.pad(attended, (0, 0, 0, 0, 0, padding), value=torch.nan), F.pad(gate, (0, padding))
        expected = value_and_gradients(lambda *t: function(selected, attended, gate, *t), [x, *parameters])  # noqa: B023
        found = value_and_gradients(lambda *t: compiled(selected, *wide, *t), [x, *parameters])  # noqa: B023
        torch.testing.assert_close(found, expected)


def test_wide_floats_are_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"gated_combine .* float16, not torch\.float64"):
        op(RaggedPairs.from_routing(MIXED))(*problem(MIXED))
