"""Parts of the attention's kernels in Triton: wide rows, queries with scores that fp32 cannot hold, in fp64.

They are slow, and a program comes here only if it has such a row, which the log-sum-exp tells. Keys are rotated and
rounded to their dtype, queries are rotated here. A block is (KEYS, D).
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_LSE = tl.constexpr(2048.0)  # rounded to fp32, a larger one makes weights wrong by over 1e-4
KEYS = tl.constexpr(16)


@triton.jit
def wide_rows(lse):
    """Not those of NaN, which an input is."""
    return tl.abs(lse) > LARGEST_LSE


@triton.jit
def narrow_lse(lse):
    """Gives wide rows no weight."""
    return tl.where(wide_rows(lse), float("inf"), lse)


@triton.jit
def any_wide(wide):
    return tl.max(wide.to(tl.int32), 0) > 0


@triton.jit
def _wide(x):
    """In fp64, by way of fp32: the interpreter is wrong about bfloat16 otherwise."""
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def _root(D: tl.constexpr):
    return tl.max(tl.sqrt(tl.full((1,), D, tl.float64)), 0)


@triton.jit
def _rotated_row(x, cos, sin, row, D: tl.constexpr):
    d = tl.arange(0, D)
    own, other = _wide(tl.load(x + d)), _wide(tl.load(x + (d ^ 1)))
    cross = tl.load(sin + row * D + d).to(tl.float64) * tl.where(d % 2 == 0, -1.0, 1.0)
    return own * tl.load(cos + row * D + d).to(tl.float64) + other * cross


@triton.jit
def _block(x, stride, rows, L: tl.constexpr, D: tl.constexpr):
    pointers = x + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return _wide(tl.load(pointers, mask=rows[:, None] < L, other=0.0))


@triton.jit
def _scores(q_row, k, stride, rows, L: tl.constexpr, D: tl.constexpr):
    scores = tl.sum(_block(k, stride, rows, L, D) * q_row[None, :], 1) / _root(D)
    return tl.where(rows < L, scores, float("-inf"))


@triton.jit
def _largest(q_row, k, stride, L: tl.constexpr, D: tl.constexpr):
    largest = tl.full((KEYS,), float("-inf"), tl.float64)
    for start in range(0, L, KEYS):
        largest = tl.maximum(largest, _scores(q_row, k, stride, start + tl.arange(0, KEYS), L, D))
    return tl.max(largest, 0)


@triton.jit
def forward_of_wide_rows(
    wide, rows, q, k, v, cos, sin, out, lse, stride_q, stride_k, stride_v, stride_o,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out and lse of the rows of a tile that are ``wide``; pointers are those of the head."""
    d = tl.arange(0, D)
    for i in range(TILE):
        here = tl.arange(0, TILE) == i
        if any_wide(wide & here):
            row = tl.max(tl.where(here, rows, 0), 0).to(tl.int64)
            q_row = _rotated_row(q + row * stride_q, cos, sin, row, D)
            largest = _largest(q_row, k, stride_k, L, D)
            total = tl.zeros((KEYS,), tl.float64)
            acc = tl.zeros((D,), tl.float64)
            for start in range(0, L, KEYS):
                keys = start + tl.arange(0, KEYS)
                odds = tl.exp(_scores(q_row, k, stride_k, keys, L, D) - largest)
                total += odds
                acc += tl.sum(odds[:, None] * _block(v, stride_v, keys, L, D), 0)
            total_sum = tl.sum(total, 0)
            tl.store(out + row * stride_o + d, (acc / total_sum).to(tl.float32).to(out.dtype.element_ty))
            tl.store(lse + row, (largest + tl.log(total_sum)).to(tl.float32))


@triton.jit
def grad_q_of_wide_rows(
    wide, rows, q, k, v, grad, cos, sin, statistics, grad_q,
    stride_q, stride_k, stride_v, stride_g, stride_d, L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """grad_q of the rows of a tile that are ``wide``, and what :func:`grad_kv_of_wide_rows` needs of them.

    That is largest score, sum of the exponentials relative to it, and delta: ``statistics``, (3, L) in fp64.
    """
    d = tl.arange(0, D)
    for i in range(TILE):
        here = tl.arange(0, TILE) == i
        if any_wide(wide & here):
            row = tl.max(tl.where(here, rows, 0), 0).to(tl.int64)
            q_row = _rotated_row(q + row * stride_q, cos, sin, row, D)
            g_row = _wide(tl.load(grad + row * stride_g + d))
            largest = _largest(q_row, k, stride_k, L, D)
            total = tl.zeros((KEYS,), tl.float64)
            delta = tl.zeros((KEYS,), tl.float64)
            for start in range(0, L, KEYS):
                keys = start + tl.arange(0, KEYS)
                odds = tl.exp(_scores(q_row, k, stride_k, keys, L, D) - largest)
                total += odds
                delta += odds * tl.sum(_block(v, stride_v, keys, L, D) * g_row[None, :], 1)
            total_sum = tl.sum(total, 0)
            delta_sum = tl.sum(delta, 0) / total_sum
            tl.store(statistics + row, largest)
            tl.store(statistics + L + row, total_sum)
            tl.store(statistics + 2 * L + row, delta_sum)
            acc = tl.zeros((D,), tl.float64)
            for start in range(0, L, KEYS):
                keys = start + tl.arange(0, KEYS)
                k_now = _block(k, stride_k, keys, L, D)
                weights = tl.exp(_scores(q_row, k, stride_k, keys, L, D) - largest) / total_sum
                products = tl.sum(_block(v, stride_v, keys, L, D) * g_row[None, :], 1)
                acc += tl.sum((weights * (products - delta_sum))[:, None] * k_now, 0)
            acc = _turned_back(acc, cos, sin, row, D) / _root(D)
            tl.store(grad_q + row * stride_d + d, acc.to(tl.float32).to(grad_q.dtype.element_ty))


@triton.jit
def _turned_back(x, cos, sin, row, D: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (D // 2, 2)))
    half = 2 * tl.arange(0, D // 2)
    cos_a, cos_b = tl.load(cos + row * D + half).to(tl.float64), tl.load(cos + row * D + half + 1).to(tl.float64)
    sin_a, sin_b = tl.load(sin + row * D + half).to(tl.float64), tl.load(sin + row * D + half + 1).to(tl.float64)
    return tl.reshape(tl.join(a * cos_a + b * sin_b, b * cos_b - a * sin_a), (D,))


@triton.jit
def grad_kv_of_wide_rows(
    rows, narrow_k, narrow_v, q, k, v, grad, lse, cos, sin, statistics, grad_k, grad_v,
    stride_q, stride_k, stride_v, stride_g, stride_d, L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores grad_k and grad_v of a tile of keys, ``rows``: (TILE, D) in fp32 from the others, and of wide queries."""
    d = tl.arange(0, D)
    for i in range(TILE):
        here = tl.arange(0, TILE) == i
        row = tl.max(tl.where(here, rows, 0), 0).to(tl.int64)
        if row < L:
            k_row = _wide(tl.load(k + row * stride_k + d))
            v_row = _wide(tl.load(v + row * stride_v + d))
            of_k = tl.zeros((D,), tl.float64)
            of_v = tl.zeros((D,), tl.float64)
            for query in range(L):
                if tl.abs(tl.load(lse + query)) > LARGEST_LSE:
                    q_row = _rotated_row(q + tl.cast(query, tl.int64) * stride_q, cos, sin, query, D)
                    g_row = _wide(tl.load(grad + tl.cast(query, tl.int64) * stride_g + d))
                    score = tl.sum(q_row * k_row, 0) / _root(D)
                    weight = tl.exp(score - tl.load(statistics + query)) / tl.load(statistics + L + query)
                    product = tl.sum(g_row * v_row, 0) - tl.load(statistics + 2 * L + query)
                    of_v += weight * g_row
                    of_k += weight * product * q_row
            of_k = _turned_back(of_k, cos, sin, row, D) / _root(D)
            of_k += tl.sum(tl.where(here[:, None], narrow_k, 0.0), 0)
            of_v += tl.sum(tl.where(here[:, None], narrow_v, 0.0), 0)
            tl.store(grad_k + row * stride_d + d, of_k.to(tl.float32).to(grad_k.dtype.element_ty))
            tl.store(grad_v + row * stride_d + d, of_v.to(tl.float32).to(grad_v.dtype.element_ty))
