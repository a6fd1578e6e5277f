"""Wide queries in Triton: fp32 cannot hold their scores or sums of values, or cannot tell them apart, so fp64 does.

The main kernels mark them by a log-sum-exp that is large, infinite or NaN, which inputs of NaN also cause. The host
does not know whether there are any, so the kernels here are always launched, and end at once if there are none.
Forward, they compute single queries again. Backward, they compute all gradients of a head that has one.

Slow: sums instead of matrix instructions, one token after the other. Tensors are those of triton_impl.py, but q and k
are not rotated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import REGISTERS
from .triton_tiles import place, rotated, store_tile, tile_of

LARGEST_LSE = tl.constexpr(2839.0)  # 4096 powers of 2: rounded to fp32, it makes weights wrong by 1.7e-4
ROWS = 64  # queries or keys of a program
LOOK = tl.constexpr(1024)  # log-sum-exps at a time


@triton.jit
def _any_wide(lse, rows, L: tl.constexpr):
    lse_rows = tl.load(lse + rows, mask=rows < L, other=0.0)
    return tl.sum((tl.abs(lse_rows) <= LARGEST_LSE).to(tl.int32), 0) < rows.shape[0]  # NaN is not smaller


@triton.jit
def _any_wide_in_head(lse, L: tl.constexpr):
    wide = False
    for start in range(0, L, LOOK):
        wide = wide | _any_wide(lse, start + tl.arange(0, LOOK), L)
    return wide


@triton.jit
def _wide_tile(x, pair, head, rows, stride_p, stride_l, L: tl.constexpr, D: tl.constexpr):
    """(rows, D) in fp64, by way of fp32: the interpreter is wrong about bfloat16 otherwise."""
    pointers = tile_of(x, pair, head, rows, stride_p, stride_l, D)
    return tl.load(pointers, mask=rows[:, None] < L, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def _rotated_tile(x, cos, sin, pair, head, rows, stride_p, stride_l, L: tl.constexpr, D: tl.constexpr):
    return rotated(_wide_tile(x, pair, head, rows, stride_p, stride_l, L, D), cos, sin, rows, L, D, False, True)


@triton.jit
def _with_key(row_max, total, score):
    """One more key: the largest score, the sum of exponentials, the factor for older terms, and the key's own term."""
    new_max = tl.maximum(row_max, score)
    rescale, probabilities = tl.exp(row_max - new_max), tl.exp(score - new_max)
    return new_max, total * rescale + probabilities, rescale, probabilities


@triton.jit
def _wide_forward_kernel(
    q, k, v, cos, sin, out, lse, num_valid,
    stride_qp, stride_ql, stride_kp, stride_kl, stride_vp, stride_vl, stride_op, stride_ol, H, num_tiles, root,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out of wide queries."""
    pair, head, tile, padding = place(num_valid, H, num_tiles, TILE)
    head_lse = lse + (pair * H + head) * L
    if padding or not _any_wide(head_lse, tile, L):
        return
    first = tl.min(tile, 0)
    for start in range(0, TILE, TOKENS):
        rows = first + start + tl.arange(0, TOKENS)
        if _any_wide(head_lse, rows, L):
            q_rows = _rotated_tile(q, cos, sin, pair, head, rows, stride_qp, stride_ql, L, D) * root
            row_max = tl.full((TOKENS,), float("-inf"), tl.float64)
            total = tl.zeros((TOKENS,), tl.float64)
            acc = tl.zeros((TOKENS, D), tl.float64)
            for key in range(L):
                at = key + tl.arange(0, 1)
                k_row = _rotated_tile(k, cos, sin, pair, head, at, stride_kp, stride_kl, L, D)
                row_max, total, rescale, probabilities = _with_key(row_max, total, tl.sum(q_rows * k_row, 1))
                v_row = _wide_tile(v, pair, head, at, stride_vp, stride_vl, L, D)
                acc = acc * rescale[:, None] + probabilities[:, None] * v_row
            lse_rows = tl.load(head_lse + rows, mask=rows < L, other=0.0)
            wide = (rows < L) & ~(tl.abs(lse_rows) <= LARGEST_LSE)
            pointers = tile_of(out, pair, head, rows, stride_op, stride_ol, D)
            result = (acc / total[:, None]).to(tl.float32).to(out.dtype.element_ty)
            tl.store(pointers, result, mask=wide[:, None])


@triton.jit
def _wide_grad_q_kernel(
    q, k, v, grad, cos, sin, lse, grad_q, statistics, num_valid,
    stride_qp, stride_ql, stride_kp, stride_kl, stride_vp, stride_vl, stride_gp, stride_gl, stride_dp, stride_dl,
    H, num_tiles, root,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """grad_q of heads with wide queries, and what :func:`_wide_grad_kv_kernel` needs of their queries.

    ``statistics``, (P, H, 3, L), are the largest score, the sum of the exponentials relative to it, and delta.
    """
    pair, head, tile, padding = place(num_valid, H, num_tiles, TILE)
    if padding or not _any_wide_in_head(lse + (pair * H + head) * L, L):
        return
    first = tl.min(tile, 0)
    for start in range(0, TILE, TOKENS):
        rows = first + start + tl.arange(0, TOKENS)
        q_rows = _rotated_tile(q, cos, sin, pair, head, rows, stride_qp, stride_ql, L, D) * root
        g_rows = _wide_tile(grad, pair, head, rows, stride_gp, stride_gl, L, D)
        row_max = tl.full((TOKENS,), float("-inf"), tl.float64)
        total = tl.zeros((TOKENS,), tl.float64)
        delta = tl.zeros((TOKENS,), tl.float64)
        for key in range(L):
            at = key + tl.arange(0, 1)
            k_row = _rotated_tile(k, cos, sin, pair, head, at, stride_kp, stride_kl, L, D)
            row_max, total, rescale, probabilities = _with_key(row_max, total, tl.sum(q_rows * k_row, 1))
            v_row = _wide_tile(v, pair, head, at, stride_vp, stride_vl, L, D)
            delta = delta * rescale + probabilities * tl.sum(g_rows * v_row, 1)
        delta /= total
        acc = tl.zeros((TOKENS, D), tl.float64)
        for key in range(L):
            at = key + tl.arange(0, 1)
            k_row = _rotated_tile(k, cos, sin, pair, head, at, stride_kp, stride_kl, L, D)
            v_row = _wide_tile(v, pair, head, at, stride_vp, stride_vl, L, D)
            weight = tl.exp(tl.sum(q_rows * k_row, 1) - row_max) / total
            acc += (weight * (tl.sum(g_rows * v_row, 1) - delta))[:, None] * k_row
        acc = rotated(acc * root, cos, sin, rows, L, D, True, True).to(tl.float32)
        store_tile(tile_of(grad_q, pair, head, rows, stride_dp, stride_dl, D), acc, rows, L, True)
        own = statistics + (pair * H + head) * 3 * L + rows
        tl.store(own, row_max, mask=rows < L)
        tl.store(own + L, total, mask=rows < L)
        tl.store(own + 2 * L, delta, mask=rows < L)


@triton.jit
def _wide_grad_kv_kernel(
    q, k, v, grad, cos, sin, lse, statistics, grad_k, grad_v, num_valid,
    stride_qp, stride_ql, stride_kp, stride_kl, stride_vp, stride_vl, stride_gp, stride_gl, stride_dp, stride_dl,
    H, num_tiles, root,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of heads with wide queries."""
    pair, head, tile, padding = place(num_valid, H, num_tiles, TILE)
    if padding or not _any_wide_in_head(lse + (pair * H + head) * L, L):
        return
    first = tl.min(tile, 0)
    of_head = statistics + (pair * H + head) * 3 * L
    for start in range(0, TILE, TOKENS):
        rows = first + start + tl.arange(0, TOKENS)
        k_rows = _rotated_tile(k, cos, sin, pair, head, rows, stride_kp, stride_kl, L, D)
        v_rows = _wide_tile(v, pair, head, rows, stride_vp, stride_vl, L, D)
        acc_k = tl.zeros((TOKENS, D), tl.float64)
        acc_v = tl.zeros((TOKENS, D), tl.float64)
        for query in range(L):
            at = query + tl.arange(0, 1)
            q_row = _rotated_tile(q, cos, sin, pair, head, at, stride_qp, stride_ql, L, D) * root
            g_row = _wide_tile(grad, pair, head, at, stride_gp, stride_gl, L, D)
            weight = tl.exp(tl.sum(k_rows * q_row, 1) - tl.load(of_head + query)) / tl.load(of_head + L + query)
            acc_v += weight[:, None] * g_row
            product = tl.sum(v_rows * g_row, 1) - tl.load(of_head + 2 * L + query)
            acc_k += (weight * product)[:, None] * q_row
        store_tile(tile_of(grad_v, pair, head, rows, stride_dp, stride_dl, D), acc_v.to(tl.float32), rows, L, True)
        acc_k = rotated(acc_k, cos, sin, rows, L, D, True, True).to(tl.float32)
        store_tile(tile_of(grad_k, pair, head, rows, stride_dp, stride_dl, D), acc_k, rows, L, True)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor,
    num_heads: int, num_valid: Tensor | None,
) -> None:  # fmt: skip
    """Writes wide queries into ``out``."""
    _launch(_wide_forward_kernel, (q, k, v, cos, sin, out, lse, num_valid), (q, k, v, out), num_heads)


def backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, num_heads: int, num_valid: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradients of heads with wide queries; all three have the same strides."""
    statistics = torch.empty((*lse.shape[:2], 3, lse.shape[2]), dtype=torch.float64, device=lse.device)
    inputs, strided = (q, k, v, grad, cos, sin, lse), (q, k, v, grad, grad_q)
    _launch(_wide_grad_q_kernel, (*inputs, grad_q, statistics, num_valid), strided, num_heads)
    _launch(_wide_grad_kv_kernel, (*inputs, statistics, grad_k, grad_v, num_valid), strided, num_heads)


def _launch(kernel, tensors, strided: tuple[Tensor, ...], num_heads: int) -> None:
    num_pairs, length, channels = strided[0].shape
    width, num_tiles = channels // num_heads, triton.cdiv(length, ROWS)
    strides = [s for t in strided for s in t.stride()[:2]]
    tokens = 1024 // width  # rows at a time, as many as fit into the registers
    # Fused multiply-adds would be free to round a score differently in the two kernels of the backward pass, or in the
    # two loops of one. These subtract the largest score from it, and are right only if both have the same bits.
    kernel[(num_tiles * num_heads * num_pairs,)](
        *tensors, *strides, num_heads, num_tiles, width**-0.5,
        L=length, D=width, TILE=ROWS, TOKENS=tokens, maxnreg=REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip
