"""Inputs of expert_attention with scores that overflow fp32, or that fp32 does not tell apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_autograd(function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


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


def large_sums(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Weights that are all alike: before it is divided by their sum, that of the values overflows."""
    return q * 1e-3, k, v.abs() * 5e37, grad * 1e-30


EXTREMES = {
    "weights that the log-sum-exp in fp32 would not tell apart": scaled(q=100, k=100),
    "differences of scores beyond the range of powers of 2": scaled(q=1e9),
    "squared lengths beyond fp32": scaled(q=1e12, k=1e12),
    "scores beyond fp32": scaled(q=1e25, k=1e25),
    "nearly the largest numbers": scaled(q=5e37, k=5e37),
    "long queries and short keys": scaled(q=5e37, k=1e-37),
    "short queries and long keys": scaled(q=1e-37, k=5e37),
    "denormal queries": scaled(q=1e-41),
    "large values": scaled(v=5e37, grad=1e-30),
    "values whose sum is beyond fp32": large_sums,
    "products of values and gradients beyond fp32": scaled(q=100, k=100, v=1e30, grad=1e30),
    "such products where scores are ordinary": scaled(k=1e-30, q=1e-30, v=1e20, grad=1e20),
    "one outlier channel": outlier_channel,
    "one long query": one_query,
    "one long key": one_key,
    "all scores hugely negative": all_negative,
}


def extreme_problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, case: str
) -> tuple[list[Tensor], list[Tensor], int]:
    """q, k, v and the gradient of the result; tables of small angles; the number of heads.

    ``shape`` is pairs, tokens, heads, head width.
    """
    num_pairs, length, heads, width = shape
    inputs = EXTREMES[case](*torch.randn(4, num_pairs, length, heads * width, dtype=torch.float64).clamp(-4, 4))
    angles = (torch.randn(length, width // 2) / 8).repeat_interleave(2, 1)
    return [t.to(dtype) for t in inputs], [angles.cos(), angles.sin()], heads
