"""The Triton kernels of swiglu_norm in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget, value_and_gradients
from test_swiglu_norm import plain, problem, truth
from torch import Tensor

from mova_kernels import BackendError, backends
from mova_kernels.ops import swiglu_norm

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")


def op(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return swiglu_norm(gate, up, weight, bias, eps, backend="triton")


SHAPES = {
    "the block is not full": (2, 3, 21),
    "the block is full": (1, 3, 64),
    "one channel is all mean": (1, 2, 1),
    "official width": (1, 2, 2730),
    "one row": (1, 1, 300),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(name, dtype) -> None:
    assert_within_budget(truth, op, plain, lambda: problem(SHAPES[name]), dtype, draws=3)


def test_padding_is_ignored() -> None:
    """It may be NaN; it gets zeros, and what counts is the same."""
    inputs = problem((2, 3, 21), torch.float32)
    padded = [F.pad(t, (0, 11), value=torch.nan) for t in inputs]
    cotangent = torch.randn(2, 3, 21)
    expected = value_and_gradients(op, inputs, cotangent)
    function = lambda *t: swiglu_norm(*t, channels=21, backend="triton")  # noqa: E731
    found = value_and_gradients(function, padded, F.pad(cotangent, (0, 11), value=torch.nan))
    torch.testing.assert_close([t[..., :21] for t in found], expected)
    assert not any(t[..., 21:].any() for t in found)


def test_more_rows_than_groups(monkeypatch) -> None:
    """A program of the backward pass has two or three rows."""
    from mova_kernels.ops.swiglu_norm import triton_impl

    monkeypatch.setattr(triton_impl, "GROUPS", 4)
    assert_within_budget(truth, op, plain, lambda: problem((2, 5, 6)), torch.float32, draws=3)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    def draw() -> list[Tensor]:
        gate, up, weight, bias = problem((1, 3, 200))
        return [30 + gate, 30 + up / 30, weight, bias]

    assert_within_budget(truth, op, plain, draw, torch.float32, draws=3)


def test_bf16_is_rounded_once() -> None:
    inputs = problem((2, 3, 21), torch.bfloat16)
    cotangent = torch.randn(2, 3, 21).bfloat16()
    found, wide = (value_and_gradients(op, x, cotangent) for x in (inputs, [t.float() for t in inputs]))
    torch.testing.assert_close(found, [t.bfloat16() for t in wide], rtol=0, atol=0)


def test_large_gates_do_not_overflow() -> None:
    _, *others = problem((1, 2, 5), torch.float32)
    gate = torch.tensor([-1e4, -100.0, 0, 100, 1e4]).expand(1, 2, 5).contiguous()
    assert all(part.isfinite().all() for part in value_and_gradients(op, [gate, *others]))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_is_added_to_the_variance(eps) -> None:
    inputs = problem((2, 3, 7), torch.float32)
    expected = swiglu_norm(*(t.double() for t in inputs), eps, backend="reference")
    torch.testing.assert_close(op(*inputs, eps), expected.float())


def test_statistics_are_those_of_the_product() -> None:
    gate, up, weight, bias = problem((2, 3, 21), torch.float32)
    _, mean, rstd = torch.ops.mova_kernels.swiglu_norm_fwd(gate, up, weight, bias, 1e-5, gate.shape[2], "triton")
    product = torch.nn.functional.silu(gate.double()) * up
    torch.testing.assert_close(mean, product.mean(-1).float())
    torch.testing.assert_close(rstd, (product.var(-1, correction=0) + 1e-5).rsqrt().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_and_up_may_be_halves_of_one_projection(dtype) -> None:
    """The padding behind each half is NaN."""
    gate, up, weight, bias = problem((2, 3, 21), dtype)
    padding = torch.full((2, 3, 3), torch.nan, dtype=dtype)
    wide = torch.cat([gate, padding, up, padding], -1)

    def halves(wide: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return op(wide[..., :21], wide[..., 24:45], weight, bias)

    value, grad_gate, grad_up, *affine = value_and_gradients(op, [gate, up, weight, bias])
    zeros = torch.zeros_like(padding)
    expected = [value, torch.cat([grad_gate, zeros, grad_up, zeros], -1), *affine]
    torch.testing.assert_close(value_and_gradients(halves, [wide, weight, bias]), expected, rtol=0, atol=0)


LAYOUTS = {
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels are not adjacent": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_honoured(layout) -> None:
    gate, up, *affine = problem((2, 3, 21), torch.float32)
    expected = value_and_gradients(op, [gate, up, *affine])
    views = [LAYOUTS[layout](gate), LAYOUTS[layout](up), *affine]
    torch.testing.assert_close(value_and_gradients(op, views), expected, rtol=0, atol=0)


def test_strided_gradients_are_honoured() -> None:
    inputs = problem((2, 3, 21), torch.float32)
    dense, one = torch.randn(2, 3, 21), torch.ones(())
    for strided in (torch.cat([dense, dense], -1)[..., :21], one.expand(2, 3, 21), dense[:, :1].expand(2, 3, 21)):
        expected, found = (value_and_gradients(op, inputs, g) for g in (strided.contiguous(), strided))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_strided_parameters_are_honoured() -> None:
    gate, up, weight, bias = problem((2, 3, 21), torch.float32)
    expected = op(gate, up, weight, bias)
    torch.testing.assert_close(op(gate, up, *torch.stack([weight, bias], 1).unbind(1)), expected, rtol=0, atol=0)


def test_fp32_parameters_with_narrow_tokens() -> None:
    """Under autocast: the result has the dtype of the tokens, the parameters' gradients have theirs."""
    gate, up, weight, bias = problem((2, 3, 21), torch.bfloat16)
    expected = value_and_gradients(op, [gate, up, weight, bias])
    found = value_and_gradients(op, [gate, up, weight.float(), bias.float()])
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    torch.testing.assert_close([t.bfloat16() for t in found], expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)], ids=["no sample", "no token"])
def test_no_row(shape) -> None:
    value, *gradients = value_and_gradients(op, problem(shape, torch.float32))
    assert value.shape == shape and not any(g.any() for g in gradients)


def test_same_bits_every_time() -> None:
    inputs = problem((2, 3, 300), torch.float32)
    first, second = (value_and_gradients(op, inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_only_some_inputs_need_gradients() -> None:
    gate, up, weight, bias = problem((1, 2, 5), torch.float32)
    (grad,) = torch.autograd.grad(op(gate, up, weight, bias.requires_grad_()).sum(), bias)
    torch.testing.assert_close(grad, torch.full((5,), 2.0))


@pytest.mark.parametrize("affine", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(affine) -> None:
    gate, up, weight, bias = problem((2, 3, 21), torch.float32)
    arguments = (gate, up, weight.to(affine), bias.to(affine), 1e-5, 19, "triton")
    torch.library.opcheck(torch.ops.mova_kernels.swiglu_norm_fwd.default, arguments)
    out, mean, rstd = torch.ops.mova_kernels.swiglu_norm_fwd(*arguments)
    arguments = (torch.randn_like(out), gate, up, weight.to(affine), mean, rstd, 19, "triton")
    torch.library.opcheck(torch.ops.mova_kernels.swiglu_norm_bwd.default, arguments)


def test_compile() -> None:
    inputs = problem((2, 3, 21), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected, found = (value_and_gradients(f, inputs) for f in (op, compiled))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_too_wide_rows_are_refused_with_a_reason() -> None:
    inputs = problem((1, 1, 4097), torch.float32)
    with pytest.raises(BackendError, match=r"cannot run swiglu_norm .* it takes F up to 4096, not 4097"):
        op(*inputs)
    assert backends.choose("swiglu_norm", None, inputs[0].device, torch.float32) != "triton"


def test_wide_floats_are_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        op(*problem((1, 1, 5)))
