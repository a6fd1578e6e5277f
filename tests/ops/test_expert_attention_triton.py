"""The Triton kernels of expert_attention in Triton's interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

import os

import pytest
import torch
from extreme_scores import EXTREMES, by_autograd, extreme_problem
from helpers import assert_within_budget, check_budget, value_and_gradients
from test_expert_attention import plain, truth
from torch import Tensor

from mova_kernels import BackendError, backends
from mova_kernels.ops import expert_attention, rope2d_table

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")


def problem(num_pairs: int, length: int, heads: int, width: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Tokens of the first ``length`` places of a grid."""
    side = int(length**0.5) + 1
    tables = tuple(t[:length] for t in rope2d_table(side, width))
    return list(torch.randn(3, num_pairs, length, heads * width)), tables


def op(tables: tuple[Tensor, Tensor], heads: int, num_valid: Tensor | None = None):
    return lambda q, k, v: expert_attention(q, k, v, *tables, heads, num_valid=num_valid, backend="triton")


# pairs, tokens, heads, head width
SHAPES = {
    "official width, one tile": (2, 64, 2, 64),
    "official width, two tiles, the last one cut": (1, 200, 1, 64),
    "narrow, the last tile cut": (1, 70, 2, 32),
    "narrow, fewer tokens than the smallest tile": (2, 9, 1, 32),
    "wide, the last tile cut": (1, 70, 1, 128),
    "tiles are full": (1, 128, 1, 128),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(name, dtype) -> None:
    num_pairs, length, heads, width = SHAPES[name]
    _, tables = problem(num_pairs, length, heads, width)
    assert_within_budget(
        truth(tables, heads),
        op(tables, heads),
        plain(tables, heads),
        lambda: problem(num_pairs, length, heads, width)[0],
        dtype,
        draws=3,
    )


@pytest.mark.usefixtures("compiled")
def test_official_head() -> None:
    tables = rope2d_table(48, 64)
    draw = lambda: list(torch.randn(3, 1, 48 * 48, 64))  # noqa: E731
    assert_within_budget(truth(tables, 1), op(tables, 1), plain(tables, 1), draw, torch.bfloat16, draws=1)


def test_one_token_attends_to_itself() -> None:
    """The result is v; the gradients of q and k are differences of equals."""
    (q, k, v), tables = problem(3, 1, 2, 32)
    cotangent = torch.randn_like(v)
    out, grad_q, grad_k, grad_v = value_and_gradients(op(tables, 2), (q, k, v), cotangent)
    torch.testing.assert_close(out, v)
    torch.testing.assert_close(grad_v, cotangent)
    for found in (grad_q, grad_k):
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-5)


def test_no_pair() -> None:
    inputs, tables = problem(0, 9, 2, 32)
    for part in value_and_gradients(op(tables, 2), inputs):
        assert part.shape == (0, 9, 64)


def test_large_scores_do_not_overflow() -> None:
    (q, k, v), tables = problem(1, 9, 1, 32)
    for part in value_and_gradients(op(tables, 1), (1e4 * q, 1e4 * k, v)):
        assert part.isfinite().all()


# Products of values and gradients are not computed in fp64: docs/limits.md.
EXTREME_SCORES = [case for case in EXTREMES if "products" not in case]


@pytest.mark.parametrize("case", EXTREME_SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_scores_have_softmax_in_fp64(dtype, case) -> None:
    """Where plain torch overflows, nothing but the rounding of the result is allowed."""
    inputs, tables, heads = extreme_problem((1, 20, 2, 32), dtype, case)
    expected = by_autograd(truth(tables, heads), *(t.double() for t in inputs))
    rival = by_autograd(plain(tables, heads), *inputs)
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, a, e, p in zip(names, by_autograd(op(tables, heads), *inputs), expected, rival, strict=True):
        fits = e.to(dtype).isfinite()
        assert e.isfinite().all() and torch.equal(a.isfinite(), fits), name
        budget = p if p.isfinite().all() else e.to(dtype)
        check_budget(name, a[fits], e[fits], budget[fits], norms=(2,))


def test_one_wide_query_among_several_tiles() -> None:
    """Forward, the others stay as they are, bit for bit; backward, the other head does."""
    inputs, tables = problem(1, 70, 2, 32)
    before = value_and_gradients(op(tables, 2), inputs)
    q, k, v = (t.clone() for t in inputs)
    q[0, 67, :32] *= 1e9
    after = value_and_gradients(op(tables, 2), (q, k, v))
    expected = value_and_gradients(truth(tables, 2), [t.double() for t in (q, k, v)])
    others = torch.arange(70) != 67
    assert torch.equal(after[0][0, others], before[0][0, others])
    for found, same, true in zip(after, before, expected, strict=True):
        assert torch.equal(found[..., 32:], same[..., 32:])
        torch.testing.assert_close(found, true.float(), rtol=1e-4, atol=1e-4)


def test_tables_may_differ_within_a_channel_pair() -> None:
    """The gradient is the adjoint of whatever the tables say, not only of a rotation."""
    inputs, _ = problem(1, 9, 1, 32)
    tables = tuple(torch.randn(2, 9, 32))
    reference = lambda q, k, v: expert_attention(q, k, v, *tables, 1, backend="reference")  # noqa: E731
    torch.testing.assert_close(*(value_and_gradients(f, inputs) for f in (op(tables, 1), reference)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_are_honoured(dtype) -> None:
    """Queries, keys and values may be slices of one projection, transposed, or have channels that are not adjacent."""
    inputs, tables = problem(2, 40, 2, 32)
    inputs = [t.to(dtype) for t in inputs]
    expected = value_and_gradients(op(tables, 2), inputs)
    packed = torch.cat(inputs, -1).split(64, -1)
    tokens_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    channels_first = [t.mT.contiguous().mT for t in inputs]
    for views in (packed, tokens_first, channels_first):
        torch.testing.assert_close(value_and_gradients(op(tables, 2), views), expected, rtol=0, atol=0)


def test_strided_gradients_are_honoured() -> None:
    inputs, tables = problem(2, 40, 2, 32)
    dense = torch.randn(2, 40, 64)
    strided = torch.cat([dense, dense], -1)[..., :64]
    expected, found = (value_and_gradients(op(tables, 2), inputs, g) for g in (dense, strided))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    one = torch.ones(())
    cotangents = one.repeat(2, 40, 64), one.expand(2, 40, 64)
    expected, found = (value_and_gradients(op(tables, 2), inputs, g) for g in cotangents)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("valid", [0, 1, 3])
def test_padding_is_skipped(valid) -> None:
    """What lies behind ``num_valid`` may be NaN; it gets zeros, also in memory that was poisoned."""
    inputs, tables = problem(3, 40, 2, 32)
    expected = value_and_gradients(op(tables, 2), [t[:valid] for t in inputs], torch.ones(valid, 40, 64))
    for t in inputs:
        t[valid:] = torch.nan
    cotangent = torch.ones(3, 40, 64)
    cotangent[valid:] = torch.nan
    found = value_and_gradients(op(tables, 2, torch.tensor([valid])), inputs, cotangent)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f[:valid], e, rtol=0, atol=0)
        assert (f[valid:] == 0).all()


def test_same_bits_every_time() -> None:
    inputs, tables = problem(2, 70, 1, 32)
    first, second = (value_and_gradients(op(tables, 1), inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_only_some_inputs_need_gradients() -> None:
    (q, k, v), tables = problem(1, 9, 1, 32)
    (grad,) = torch.autograd.grad(op(tables, 1)(q, k, v.requires_grad_()).sum(), v)
    assert grad.shape == v.shape


@pytest.mark.parametrize("num_valid", [None, torch.tensor([1])], ids=["all", "padded"])
def test_opcheck(num_valid) -> None:
    (q, k, v), tables = problem(2, 9, 2, 32)
    arguments = (q, k, v, *tables, 2, num_valid, "triton")
    torch.library.opcheck(torch.ops.mova_kernels.expert_attention_fwd.default, arguments)
    out, lse = torch.ops.mova_kernels.expert_attention_fwd(*arguments)
    arguments = (torch.randn_like(out), q, k, v, out, lse, *tables, 2, num_valid, "triton")
    torch.library.opcheck(torch.ops.mova_kernels.expert_attention_bwd.default, arguments)


def test_compile() -> None:
    inputs, tables = problem(2, 9, 2, 32)
    num_valid = torch.tensor([1])
    torch._dynamo.reset()
    compiled = torch.compile(op(tables, 2, num_valid), fullgraph=True, backend="aot_eager")
    expected, found = (value_and_gradients(f, inputs) for f in (op(tables, 2, num_valid), compiled))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_log_sum_exp() -> None:
    (q, k, v), (cos, sin) = problem(2, 40, 2, 32)
    _, lse = torch.ops.mova_kernels.expert_attention_fwd(q, k, v, cos, sin, 2, None, "triton")
    factor = torch.complex(cos, sin)[:, None, ::2]
    q, k = (torch.view_as_complex(t.unflatten(2, (2, 16, 2))) * factor for t in (q, k))
    scores = torch.einsum("pshc,pthc->phst", q, k.conj()).real / 32**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_other_widths_are_refused_with_a_reason() -> None:
    inputs, tables = problem(1, 9, 1, 48)
    with pytest.raises(BackendError, match=r"cannot run expert_attention .* head widths 32, 64 and 128, not 48"):
        op(tables, 1)(*inputs)
    assert backends.choose("expert_attention", None, inputs[0].device, torch.float32) != "triton"


def test_wide_floats_are_refused_with_a_reason() -> None:
    inputs, tables = problem(1, 9, 1, 32)
    with pytest.raises(BackendError, match=r"it takes float32, bfloat16 and float16, not torch\.float64"):
        op(tables, 1)(*(t.double() for t in inputs))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="it is about the interpreter")
def test_bfloat16_is_refused_where_the_interpreter_is_wrong_about_it(monkeypatch) -> None:
    monkeypatch.undo()  # of the fixture triton_kernels
    inputs, tables = problem(1, 9, 1, 32)
    with pytest.raises(BackendError, match="interpreter"):
        op(tables, 1)(*(t.bfloat16() for t in inputs))
