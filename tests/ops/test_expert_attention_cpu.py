"""expert_attention in C++, called as cpu_impl calls it, on every instruction set of this processor."""

from __future__ import annotations

import math

import pytest
import torch
from extreme_scores import EXTREMES, by_autograd, extreme_problem
from helpers import assert_threads_do_not_matter, check_budget
from test_expert_attention import plain, truth
from torch import Tensor

from mova_kernels.ops.expert_attention.cpu_impl import backward, forward

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
# pairs, tokens, heads, head width
SHAPES = {
    "a tile of keys and a rest, less than a vector of channels": (2, 70, 2, 6),
    "two blocks of keys": (1, 400, 1, 64),
    "one token less than a panel of queries": (1, 23, 2, 16),
    "one token more": (2, 25, 1, 32),
    "fewer channels than a tile has columns, more than a vector": (1, 30, 1, 20),
    "two tiles of channels": (1, 40, 2, 128),
    "two tiles of channels, the second one cut, long sums": (1, 65, 1, 200),
    "one token": (2, 1, 2, 8),
    "many heads": (3, 7, 30, 4),
}


def problem(
    num_pairs: int, length: int, heads: int, width: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the gradient of the result; tables that are no rotation, nor the same within a channel pair."""
    return list(torch.randn(4, num_pairs, length, heads * width).to(dtype)), list(torch.randn(2, length, width))


def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, tables: list[Tensor], heads: int, count: Tensor | None = None):
    out, lse = forward(q, k, v, *tables, heads, count)
    return out, *backward(grad, q, k, v, out, lse, *tables, heads, count)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget(name, dtype):
    num_pairs, length, heads, width = SHAPES[name]
    inputs, _ = problem(num_pairs, length, heads, width, dtype)
    angles = torch.randn(length, width // 2).repeat_interleave(2, 1)
    tables = [angles.cos(), angles.sin()]
    expected = by_autograd(truth(tables, heads), *(t.double() for t in inputs))
    rival = by_autograd(plain(tables, heads), *inputs)
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, a, e, p in zip(names, both(*inputs, tables, heads), expected, rival, strict=True):
        if length > 1 or name not in ("grad_q", "grad_k"):
            check_budget(name, a, e, p, norms=(2,), times=1.5)
        else:  # differences of equals: zeros, of which fused products leave the rounding
            torch.testing.assert_close(a, torch.zeros_like(a), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_gradients_are_the_adjoint_for_any_table():
    """Tables may differ within a channel pair."""
    inputs, tables = problem(1, 9, 2, 8, torch.float32)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cos, sin = (t.double() for t in tables)
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = (t * cos + torch.stack((-t[..., 1::2], t[..., ::2]), -1).flatten(-2) * sin for t in (q, k))
        return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    expected = by_autograd(explicit, *(t.double() for t in inputs))
    for a, e in zip(both(*inputs, tables, 2), expected, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_neither_read_nor_computed(dtype):
    inputs, tables = problem(3, 30, 2, 8, dtype)
    expected = both(*(t[:2].clone() for t in inputs), tables, 2)
    for t in inputs:
        t[2] = torch.nan
    for a, e in zip(both(*inputs, tables, 2, torch.tensor([2])), expected, strict=True):
        assert torch.equal(a[:2], e) and not a[2].any()


def test_more_heads_than_scratch_memory_is_kept_for():
    """Backward takes them in two goes."""
    inputs, tables = problem(2740, 2, 16, 2, torch.float32)
    expected = both(*(t[-10:].clone() for t in inputs), tables, 16)
    for a, e in zip(both(*inputs, tables, 16), expected, strict=True):
        assert torch.equal(a[-10:], e)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype):
    """Slices of one projection, pairs that are one and the same, gradients without strides."""
    _, tables = problem(1, 11, 2, 8, dtype)
    wide = torch.randn(2, 11, 70).to(dtype)
    q, k, v = wide[..., 1:17], wide[:1, :, 20:36].expand(2, -1, -1), wide[..., 40:56]
    for grad in (wide[..., 50:66], torch.ones((), dtype=dtype).expand(2, 11, 16)):
        views, copies = (
            (both(*inputs, tables, 2)) for inputs in ((q, k, v, grad), [t.contiguous() for t in (q, k, v, grad)])
        )
        assert all(map(torch.equal, views, copies))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_results(dtype):
    """Neither where a thread begins in the middle of a head, nor where a head's keys are split into parts."""
    inputs, tables = problem(1, 800, 1, 8, dtype)
    assert_threads_do_not_matter(lambda: both(*inputs, tables, 1))


def test_large_and_missing_scores():
    """Scores of a thousand; a query of NaN spoils itself and, backward, what it looked at."""
    (q, k, v, grad), tables = problem(1, 30, 1, 8, torch.float32)
    assert all(t.isfinite().all() for t in both(100 * q, 100 * k, v, grad, tables, 1))
    q[0, 3] = torch.nan
    out, grad_q, grad_k, grad_v = both(q, k, v, grad, tables, 1)
    others = [i for i in range(30) if i != 3]
    assert out[0, 3].isnan().all() and out[0, others].isfinite().all() and grad_q[0, others].isfinite().all()
    assert grad_k.isnan().all() and grad_v.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["long but orthogonal", "too long to be squared", "the last key only"])
def test_scores_beyond_what_powers_can_hold(case, dtype):
    """Which keys' scores the kernel looks at beforehand depends on lengths, and on whether that turns out to do."""
    (q, k, v, _), _ = problem(1, 70, 1, 8, dtype)
    length = 1e21 if case == "too long to be squared" else 300
    q[0, ::2, 0] = length
    q[..., 1], k[..., 0], k[..., 1] = 0, 0, length
    if case == "the last key only":
        k[..., -1, 0] = length
    tables = [torch.ones(70, 8), torch.zeros(70, 8)]
    out, lse = forward(q, k, v, *tables, 1, None)
    check_budget("out", out, truth(tables, 1)(*(t.double() for t in (q, k, v))), plain(tables, 1)(q, k, v), times=1.5)
    scores = q[0].double() @ k[0].double().T / 8**0.5
    # The coarse exp2 errs by 7.5e-5, which is 1.1e-4 in log2.
    torch.testing.assert_close(lse[0, 0].double(), scores.logsumexp(1) / math.log(2), rtol=1e-5, atol=2e-4)


def test_very_negative_scores():
    """Keys that only fill up a tile would have a score of 0, far above all others."""
    inputs, _ = problem(1, 25, 1, 8, torch.float32)
    inputs[0][:], inputs[1][:] = -100, 1
    tables = [torch.ones(25, 8), torch.zeros(25, 8)]
    expected = by_autograd(plain(tables, 1), *inputs)
    torch.testing.assert_close(list(both(*inputs, tables, 1)), expected, rtol=1e-4, atol=1e-4)


# pairs, tokens, heads, head width
EXTREME_SHAPES = {
    "one pair of channels": (4, 40, 4, 2),
    "a tile of keys and a rest, less than a vector of channels": (2, 70, 2, 6),
    "more queries than a thread takes at a time": (1, 200, 1, 16),
    "the widest head": (1, 65, 1, 256),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("shape", EXTREME_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_inputs_have_softmax_in_fp64(dtype, shape, case):
    """Where plain torch overflows, nothing but the rounding of the result is allowed."""
    inputs, tables, heads = extreme_problem(EXTREME_SHAPES[shape], dtype, case)
    expected = by_autograd(truth(tables, heads), *(t.double() for t in inputs))
    rival = by_autograd(plain(tables, heads), *inputs)
    names = ("out", "grad_q", "grad_k", "grad_v")
    for name, a, e, p in zip(names, both(*inputs, tables, heads), expected, rival, strict=True):
        fits = e.to(dtype).isfinite()
        assert e.isfinite().all() and torch.equal(a.isfinite(), fits), name
        budget = p if p.isfinite().all() else e.to(dtype)
        check_budget(name, a[fits], e[fits], budget[fits], norms=(2,), times=1.5)


def unturned(*shape: int) -> tuple[list[Tensor], list[Tensor]]:
    return list(torch.randn(4, *shape)), [torch.ones(shape[1:]), torch.zeros(shape[1:])]


def test_equal_keys_share_the_weight():
    """Differences are what counts, however large the scores."""
    (q, k, v, grad), tables = unturned(1, 40, 8)
    q[:], k[:] = 1e30, 1e30
    k[0, 10:] = -1e30
    out, grad_q, grad_k, grad_v = both(q, k, v, grad, tables, 1)
    torch.testing.assert_close(out[0], v[0, :10].mean(0).expand(40, 8))
    torch.testing.assert_close(grad_v[0, :10], grad[0].sum(0).expand(10, 8) / 10)
    assert not grad_v[0, 10:].any() and all(t.isfinite().all() for t in (grad_q, grad_k))


@pytest.mark.parametrize("large", [1e5, 1e12, 1e30])
def test_log_sum_exp_of_large_scores(large):
    """As far as fp32 holds it; backward does not need it beyond."""
    (q, k, v, _), tables = unturned(1, 40, 8)
    _, lse = forward(q * large, k, v, *tables, 1, None)
    expected = ((large * q.double()) @ k.double().mT / 8**0.5).logsumexp(-1) / math.log(2)
    torch.testing.assert_close(lse[0], expected.float(), rtol=1e-6, atol=0)


def test_ordinary_queries_stay_as_they_are():
    """What is computed in fp64 is chosen query by query."""
    (q, k, v, _), tables = unturned(1, 200, 8)
    before = forward(q, k, v, *tables, 1, None)[0]
    q[0, 7] *= 1e8
    after = forward(q, k, v, *tables, 1, None)[0]
    others = torch.arange(200) != 7
    torch.testing.assert_close(after[0, others], before[0, others])
    assert torch.equal(after[0, 7], v[0, (k[0] @ q[0, 7]).argmax()])


def test_missing_queries_beside_large_ones():
    """NaN spoils what depends on it, and nothing else."""
    (q, k, v, grad), tables = unturned(2, 30, 8)
    q *= 1e12
    expected = both(q, k, v, grad, tables, 1)
    q[0, 3] = torch.nan
    found = both(q, k, v, grad, tables, 1)
    others = torch.arange(30) != 3
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f[1], e[1])
    for f, e in zip(found[:2], expected[:2], strict=True):
        assert f[0, 3].isnan().all() and torch.equal(f[0, others], e[0, others])
    assert found[2][0].isnan().all() and found[3][0].isnan().all()


def test_a_missing_value_beside_large_scores():
    (q, k, v, _), tables = unturned(1, 30, 8)
    v[0, 4, 2] = torch.nan
    out = forward(1e12 * q, k, v, *tables, 1, None)[0]
    columns = torch.arange(8) != 2
    assert out[0, :, 2].isnan().all() and out[0][:, columns].isfinite().all()


def test_padding_beside_large_scores():
    (q, k, v, grad), tables = unturned(3, 30, 8)
    q *= 1e12
    expected = both(*(t[:2].clone() for t in (q, k, v, grad)), tables, 1)
    q[2] = torch.nan
    for f, e in zip(both(q, k, v, grad, tables, 1, torch.tensor([2])), expected, strict=True):
        assert torch.equal(f[:2], e) and not f[2].any()


def test_tiny_values_where_all_scores_are_low():
    """Powers of 2 that are far below 1 times values that are nearly denormal."""
    (q, k, v, _), tables = unturned(1, 40, 2)
    q[:], k[:] = -4, 5
    v *= 1e-34
    out = forward(q, k, v, *tables, 1, None)[0]
    torch.testing.assert_close(out[0], v[0].double().mean(0).expand(40, 2).float(), rtol=1e-5, atol=1e-40)


def test_threads_do_not_change_results_for_large_scores():
    inputs, tables = unturned(1, 800, 8)
    inputs[0][0, ::3] *= 1e12
    assert_threads_do_not_matter(lambda: both(*inputs, tables, 1))


def test_bad_blocks():
    inputs, tables = problem(1, 5, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=r"mk_expert_attention_fwd: D must be in \[2, 256\], got 258"):
        forward(*(torch.zeros(1, 5, 258),) * 3, *torch.zeros(2, 5, 258), 1, None)
    with pytest.raises(ValueError, match="mk_expert_attention_fwd: D must be even, got 7"):
        forward(*(torch.zeros(1, 5, 7),) * 3, *torch.zeros(2, 5, 7), 1, None)
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 1\], got 2"):
        forward(*(t.half() for t in inputs[:3]), *tables, 1, None)
