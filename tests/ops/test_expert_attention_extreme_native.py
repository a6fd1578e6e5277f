"""expert_attention in C++ where fp32 overflows or does not tell scores apart: softmax in fp64 is the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import assert_threads_do_not_matter, check_budget
from test_expert_attention import plain, truth
from test_expert_attention_native import DTYPES, both, by_autograd
from torch import Tensor

from mova_kernels.ops.expert_attention.native_impl import forward

pytestmark = pytest.mark.usefixtures("poisoned_memory", "isa")


def scaled(q: float = 1, k: float = 1, v: float = 1, grad: float = 1) -> Callable[..., list[Tensor]]:
    return lambda *inputs: [t * factor for t, factor in zip(inputs, (q, k, v, grad), strict=True)]


def outlier_channel(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    q[..., 1] *= 1e5
    k[..., 1] *= 1e5
    return [q, k, v, grad]


def one_query(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    q[:, 3] *= 1e12
    return [q, k, v, grad]


def one_key(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    k[:, -1] *= 1e30
    return [q, k, v, grad]


def all_negative(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Turned by small angles, they still point away from each other."""
    return [-1e20 * (1 + 0.1 * q.abs()), 1e20 * (1 + 0.1 * k.abs()), v, grad]


CASES = {
    "weights that the log-sum-exp in fp32 would not tell apart": scaled(q=100, k=100),
    "differences of scores beyond the range of powers of 2": scaled(q=1e9),
    "squared lengths beyond fp32": scaled(q=1e12, k=1e12),
    "scores beyond fp32": scaled(q=1e25, k=1e25),
    "nearly the largest numbers": scaled(q=5e37, k=5e37),
    "long queries and short keys": scaled(q=5e37, k=1e-37),
    "short queries and long keys": scaled(q=1e-37, k=5e37),
    "denormal queries": scaled(q=1e-41),
    "large values": scaled(v=5e37, grad=1e-30),
    "products of values and gradients beyond fp32": scaled(q=100, k=100, v=1e30, grad=1e30),
    "such products where scores are ordinary": scaled(k=1e-30, q=1e-30, v=1e20, grad=1e20),
    "one outlier channel": outlier_channel,
    "one long query": one_query,
    "one long key": one_key,
    "all scores hugely negative": all_negative,
}
# pairs, tokens, heads, head width
SHAPES = {
    "one pair of channels": (4, 40, 4, 2),
    "a tile of keys and a rest, less than a vector of channels": (2, 70, 2, 6),
    "more queries than a thread takes at a time": (1, 200, 1, 16),
    "the widest head": (1, 65, 1, 256),
}


def problem(shape: str, dtype: torch.dtype, case: str) -> tuple[list[Tensor], list[Tensor], int]:
    """q, k, v and the gradient of the result; tables of small angles; the number of heads."""
    num_pairs, length, heads, width = SHAPES[shape]
    inputs = CASES[case](*torch.randn(4, num_pairs, length, heads * width, dtype=torch.float64).clamp(-4, 4))
    angles = (torch.randn(length, width // 2) / 8).repeat_interleave(2, 1)
    return [t.to(dtype) for t in inputs], [angles.cos(), angles.sin()], heads


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_in_fp64_is_the_truth(dtype, shape, case):
    """Where plain torch overflows, nothing but the rounding of the result is allowed."""
    inputs, tables, heads = problem(shape, dtype, case)
    expected = by_autograd(truth(tables, heads), *(t.double() for t in inputs))
    rival = by_autograd(plain(tables, heads), *inputs)
    for name, a, e, p in zip(
        ("out", "grad_q", "grad_k", "grad_v"), both(*inputs, tables, heads), expected, rival, strict=True
    ):
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
def test_log_sum_exp(large):
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


def test_missing_numbers_beside_large_ones():
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


def test_padding_is_left_alone():
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


def test_threads_do_not_change_results():
    inputs, tables = unturned(1, 800, 8)
    inputs[0][0, ::3] *= 1e12
    assert_threads_do_not_matter(lambda: both(*inputs, tables, 1))
