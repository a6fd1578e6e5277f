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
    "one pair of channels": (1, 9, 2, 2),
    "a tile of keys and a rest, less than a vector of channels": (2, 70, 2, 6),
    "more queries than a thread takes at a time": (1, 200, 1, 16),
    "long sums": (1, 65, 1, 200),
    "the widest head": (1, 9, 1, 256),
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
    for name, a, e, p in zip(("out", "grad_q", "grad_k", "grad_v"), both(*inputs, tables, heads), expected, rival):
        fits = e.to(dtype).isfinite()
        assert e.isfinite().all() and torch.equal(a.isfinite(), fits), name
        budget = p if p.isfinite().all() else e.to(dtype)
        check_budget(name, a[fits], e[fits], budget[fits], norms=(2,), times=1.5)
