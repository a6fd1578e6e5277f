"""ragged_linear in Triton: matrix products of the pairs, each with the folded weights of its expert.

The affine part of an expert is folded into its weights first, in one launch for all experts and projections which skips
experts without pairs: V_e = W_e diag(g_e), and the constant W_e b_e + c_e. The V_e lie one after the other in a buffer,
(O, C_e) each, where O counts the outputs of all projections. This happens at every call: to read and write the weights
of the selected experts once is little beside the products, and nothing can become stale.

The products are persistent: a fixed number of programs share the tiles of all pairs, and find in the pairs' tables on
the device what belongs together. A tile sums in the order of the tables, so the bits are the same at every call. The
kernels are those of gated_combine, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._jit import REGISTERS, adjacent_channels, arithmetic, dot_precision, num_multiprocessors, pick
from ..._tune import Config, bucket, tuned
from ...ragged import PairTables

# (arithmetic, whether tiles of 128 are cut somewhere) -> tile of the result (two sides), step of the loop, warps,
# stages, programs per multiprocessor. Masks need registers, so cut tiles are smaller. Chosen so that nothing spills on
# sm_80, sm_90 and sm_100 (tools/compile_gate.py); not measured.
CONFIGS = {
    ("16-bit", False): (128, 128, 64, 8, 3, 1),
    ("16-bit", True): (64, 128, 64, 8, 3, 1),
    ("tf32", False): (64, 64, 32, 4, 3, 2),
    ("tf32", True): (64, 64, 32, 4, 3, 2),
    ("ieee", False): (64, 64, 32, 8, 2, 2),
    ("ieee", True): (64, 64, 32, 8, 2, 2),
}
TILES = ((128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
CANDIDATES = {  # what a search tries (mova_kernels/_tune.py)
    kind: [
        (*tile, step, warps, stages, programs)
        for tile in TILES
        for step in ((32, 64) if kind == "16-bit" else (16, 32))
        for warps in (4, 8)
        for stages in (2, 3, 4)
        for programs in (1, 2)
    ]
    for kind in ("16-bit", "tf32", "ieee")
}
FOLD_ROWS, FOLD_COLUMNS = 16, 256


class Folded(NamedTuple):
    """The weights of all experts as the products take them."""

    weight: Tensor  # V: per expert (O, C_e), one after the other
    constant: Tensor  # (N, O) fp32
    widths: tuple[int, ...]  # C_e
    outputs: tuple[int, ...]  # the outputs of each projection; O in all


@triton.jit
def _sum_before(values: tl.constexpr, i):
    """values[0] + ... + values[i - 1]."""
    total = 0 * i
    for j in tl.static_range(len(values)):
        total += tl.where(i > j, values[j], 0)
    return total


@triton.jit
def _locate(tile, num_tiles: tl.constexpr):
    """In which of the ranges with so many tiles each the tile lies, and its number there."""
    which = 0 * tile
    first = 0 * tile
    end = 0
    for j in tl.static_range(len(num_tiles) - 1):
        end += num_tiles[j]
        which += tl.where(tile >= end, 1, 0)
        first = tl.where(tile >= end, end, first)
    return which, tile - first


@triton.jit
def _multiply(
    acc, a, b, stride_ak, stride_bk, row_ok, column_ok, depth,
    TILE_K: tl.constexpr, CUT: tl.constexpr, CUT_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + A B, from pointers to the first TILE_K columns of A and rows of B. CUT, CUT_K: not all is in range."""
    ks = tl.arange(0, TILE_K)
    for k in range(0, depth, TILE_K):
        if CUT_K:
            k_ok = k + ks < depth
            a_now = tl.load(a, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            b_now = tl.load(b, mask=k_ok[:, None] & column_ok[None, :], other=0.0)
        elif CUT:
            a_now = tl.load(a, mask=row_ok[:, None], other=0.0)
            b_now = tl.load(b, mask=column_ok[None, :], other=0.0)
        else:
            a_now = tl.load(a)
            b_now = tl.load(b)
        acc = tl.dot(a_now, b_now, acc, input_precision=PRECISION)
        a += TILE_K * stride_ak
        b += TILE_K * stride_bk
    return acc


@triton.jit
def _fold_kernel(
    weights, scales, shifts, biases, offsets, folded, constant,
    WIDTHS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, TOTAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of V and of the constant, for one projection of one expert; nothing for an expert without pairs."""
    e = tl.program_id(1)
    if tl.load(offsets + e) == tl.load(offsets + e + 1):
        return
    i, block = _locate(tl.program_id(0), BLOCKS)
    member = i * len(WIDTHS) + e
    rows = block * ROWS + tl.arange(0, ROWS)
    row_ok = rows < pick(OUTPUTS, i)
    width = pick(WIDTHS, e)
    weight = pick(weights, member) + rows[:, None].to(tl.int64) * width
    rows_of_all = _sum_before(OUTPUTS, i) + rows
    out = folded + _sum_before(WIDTHS, e).to(tl.int64) * TOTAL + rows_of_all[:, None].to(tl.int64) * width
    scale, shift = pick(scales, e), pick(shifts, e)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        ok = row_ok[:, None] & (columns < width)[None, :]
        w = tl.load(weight + columns[None, :], mask=ok, other=0.0).to(tl.float32)
        g = tl.load(scale + columns, mask=columns < width, other=0.0).to(tl.float32)
        b = tl.load(shift + columns, mask=columns < width, other=0.0).to(tl.float32)
        tl.store(out + columns[None, :], (w * g[None, :]).to(folded.dtype.element_ty), mask=ok)
        total += tl.sum(w * b[None, :], 1)
    if len(biases) > 0:
        total += tl.load(pick(biases, member) + rows, mask=row_ok, other=0.0).to(tl.float32)
    tl.store(constant + e * TOTAL + rows_of_all, total, mask=row_ok)


@triton.jit(do_not_specialize=["num_pairs"])  # another one every batch: it must not be compiled anew
def _project_kernel(
    sources, source_strides, token_strides, outs, index, expert, count, folded, constant, num_pairs,
    WIDTHS: tl.constexpr, OUTPUTS: tl.constexpr, TILES: tl.constexpr, TOTAL: tl.constexpr, L: tl.constexpr,
    TILES_PER_PAIR: tl.constexpr, CUT: tl.constexpr, CUT_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """outs[i][p] = x V^T + constant, where x is row index[p] of the source of the pair's expert; zeros for padding."""
    used = tl.load(count)
    ks = tl.arange(0, TILE_K)
    M_TILES: tl.constexpr = (L + TILE_M - 1) // TILE_M
    for step in range(0, num_pairs * TILES_PER_PAIR - tl.program_id(0), tl.num_programs(0)):
        tile = tl.program_id(0) + step
        p = (tile // TILES_PER_PAIR).to(tl.int64)
        inside = tile % TILES_PER_PAIR
        i, n = _locate(inside // M_TILES, TILES)
        rows = (inside % M_TILES) * TILE_M + tl.arange(0, TILE_M)
        columns = n * TILE_N + tl.arange(0, TILE_N)
        width_out = pick(OUTPUTS, i)
        row_ok, column_ok = rows < L, columns < width_out
        acc = tl.zeros((TILE_M, TILE_N), tl.float32)
        if p < used:
            e = tl.load(expert + p)
            width = pick(WIDTHS, e)
            weight_rows = _sum_before(OUTPUTS, i) + columns
            a = pick(sources, e) + tl.load(index + p) * pick(source_strides, e)
            a += rows[:, None].to(tl.int64) * pick(token_strides, e) + ks[None, :]
            b = folded + _sum_before(WIDTHS, e).to(tl.int64) * TOTAL + weight_rows[None, :] * width + ks[:, None]
            acc = _multiply(acc, a, b, 1, 1, row_ok, column_ok, width, TILE_K, CUT, CUT_K, PRECISION)
            acc += tl.load(constant + e * TOTAL + weight_rows, mask=column_ok, other=0.0)[None, :]
        out = pick(outs, i) + (p * L + rows[:, None]) * width_out + columns[None, :]
        acc = acc.to(out.dtype.element_ty)
        if CUT:
            tl.store(out, acc, mask=row_ok[:, None] & column_ok[None, :])
        else:
            tl.store(out, acc)


@triton.jit(do_not_specialize=["num_outs"])
def _collect_kernel(
    a, a_strides, token_strides, a_index, outs, out_index, residual, gate, expert, count, by_sample, sample_offsets,
    folded, constant, num_outs, residual_stride, residual_token_stride,
    WIDTHS: tl.constexpr, OUTPUTS: tl.constexpr, TOTAL: tl.constexpr, L: tl.constexpr, TRANSPOSED: tl.constexpr,
    N_TILES: tl.constexpr, CUT: tl.constexpr, CUT_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of products over the pairs of a sample (by_sample given), or the product of one pair.

    A pair contributes sum_i a[i] V_i or, if TRANSPOSED, a[0] V^T + gate * constant, with row a_index[p] of a (None: p).
    A sample's sum starts with its residual, if there is one. A pair's product goes to row out_index[p] (None: p) of its
    expert's out; nothing is written for padding.
    """
    used = tl.load(count)
    ks = tl.arange(0, TILE_K)
    M_TILES: tl.constexpr = (L + TILE_M - 1) // TILE_M
    for step in range(0, num_outs * M_TILES * N_TILES - tl.program_id(0), tl.num_programs(0)):
        tile = tl.program_id(0) + step
        target = (tile // (M_TILES * N_TILES)).to(tl.int64)
        inside = tile % (M_TILES * N_TILES)
        rows = (inside % M_TILES) * TILE_M + tl.arange(0, TILE_M)
        columns = (inside // M_TILES) * TILE_N + tl.arange(0, TILE_N)
        row_ok = rows < L
        acc = tl.zeros((TILE_M, TILE_N), tl.float32)
        if by_sample is not None:
            start = tl.load(sample_offsets + target)
            stop = tl.load(sample_offsets + target + 1)
        else:
            start = target
            stop = tl.minimum(target + 1, used)
        for s in range(start, stop):
            p = s
            if by_sample is not None:
                p = tl.load(by_sample + s)
            e = tl.load(expert + p)
            a_row = p
            if a_index is not None:
                a_row = tl.load(a_index + p)
            width = pick(WIDTHS, e)
            v = folded + _sum_before(WIDTHS, e).to(tl.int64) * TOTAL
            for i in tl.static_range(len(a)):
                x = a[i] + a_row * a_strides[i] + rows[:, None].to(tl.int64) * token_strides[i] + ks[None, :]
                if TRANSPOSED:
                    b = v + columns[None, :] * width + ks[:, None]
                    acc = _multiply(acc, x, b, 1, 1, row_ok, columns < TOTAL, width, TILE_K, CUT, CUT_K, PRECISION)
                else:
                    b = v + (_sum_before(OUTPUTS, i) + ks[:, None]) * width + columns[None, :]
                    acc = _multiply(
                        acc, x, b, 1, width, row_ok, columns < width, OUTPUTS[i], TILE_K, CUT, CUT_K, PRECISION
                    )
            if TRANSPOSED:
                shift = tl.load(constant + e * TOTAL + columns, mask=columns < TOTAL, other=0.0)
                acc += tl.load(gate + p) * shift[None, :]
        if by_sample is not None:
            width_out = TOTAL if TRANSPOSED else WIDTHS[0]
            ok = row_ok[:, None] & (columns < width_out)[None, :]
            if residual is not None:
                base = residual + target * residual_stride + rows[:, None].to(tl.int64) * residual_token_stride
                acc += tl.load(base + columns[None, :], mask=ok, other=0.0).to(tl.float32)
            out = outs[0] + (target * L + rows[:, None]) * width_out + columns[None, :]
            tl.store(out, acc.to(out.dtype.element_ty), mask=ok)
        elif target < used:
            e = tl.load(expert + target)
            out_row = target
            if out_index is not None:
                out_row = tl.load(out_index + target)
            width_out = pick(WIDTHS, e)
            ok = row_ok[:, None] & (columns < width_out)[None, :]
            out = pick(outs, e) + (out_row * L + rows[:, None]) * width_out + columns[None, :]
            tl.store(out, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _grad_weight_kernel(
    grads, grad_strides, grad_token_strides, grad_index, sources, source_strides, token_strides, index, gate, offsets,
    weights, scales, shifts, grad_weights, grad_biases, partial_scale, partial_shift,
    WIDTHS: tl.constexpr, OUTPUTS: tl.constexpr, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr,
    SUM_WIDTHS: tl.constexpr, L: tl.constexpr, CUT: tl.constexpr, CUT_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's grad_weight, and what it adds to the gradients of the affine part.

    With dV = dy^T x and s = sum of gate * dy over all tokens of the expert's pairs: dW = dV diag(g) + s b^T, db = W^T s
    and dg_c = sum over rows of dV W. x and dy are rows index[p] and grad_index[p] (None: p). Zeros without pairs.
    """
    e, column_tile = _locate(tl.program_id(1), COLUMN_TILES)
    i, row_tile = _locate(tl.program_id(0), ROW_TILES)
    rows = row_tile * TILE_M + tl.arange(0, TILE_M)
    columns = column_tile * TILE_N + tl.arange(0, TILE_N)
    width = pick(WIDTHS, e)
    row_ok, column_ok = rows < pick(OUTPUTS, i), columns < width
    ks = tl.arange(0, TILE_K)
    grad_stride, x_stride = pick(grad_token_strides, i), pick(token_strides, e)
    grad = pick(grads, i) + ks[:, None].to(tl.int64) * grad_stride + rows[None, :]
    x = pick(sources, e) + ks[:, None].to(tl.int64) * x_stride + columns[None, :]
    acc = tl.zeros((TILE_M, TILE_N), tl.float32)
    total = tl.zeros((TILE_M,), tl.float32)
    for p in range(tl.load(offsets + e), tl.load(offsets + e + 1)):
        grad_row = p
        if grad_index is not None:
            grad_row = tl.load(grad_index + p)
        x_row = p
        if index is not None:
            x_row = tl.load(index + p)
        grad_now = grad + grad_row * pick(grad_strides, i)
        x_now = x + x_row * pick(source_strides, e)
        of_pair = total
        if gate is not None:
            of_pair = tl.zeros((TILE_M,), tl.float32)
        for start in range(0, L, TILE_K):
            if CUT_K:
                k_ok = (start + ks < L)[:, None]
                dy = tl.load(grad_now, mask=k_ok & row_ok[None, :], other=0.0)
                t = tl.load(x_now, mask=k_ok & column_ok[None, :], other=0.0)
            elif CUT:
                dy = tl.load(grad_now, mask=row_ok[None, :], other=0.0)
                t = tl.load(x_now, mask=column_ok[None, :], other=0.0)
            else:
                dy = tl.load(grad_now)
                t = tl.load(x_now)
            acc = tl.dot(tl.trans(dy), t, acc, input_precision=PRECISION)
            of_pair += tl.sum(dy.to(tl.float32), 0)
            grad_now += TILE_K * grad_stride
            x_now += TILE_K * x_stride
        if gate is not None:
            of_pair = total + of_pair * tl.load(gate + p)
        total = of_pair

    member = i * len(WIDTHS) + e
    ok = row_ok[:, None] & column_ok[None, :]
    place = rows[:, None] * width + columns[None, :]
    w_tile = pick(weights, member) + place
    if CUT:
        w = tl.load(w_tile, mask=ok, other=0.0).to(tl.float32)
    else:
        w = tl.load(w_tile).to(tl.float32)
    partial = (_sum_before(ROW_TILES, i) + row_tile) * SUM_WIDTHS + _sum_before(WIDTHS, e) + columns
    tl.store(partial_scale + partial, tl.sum(acc * w, 0), mask=column_ok)
    tl.store(partial_shift + partial, tl.sum(total[:, None] * w, 0), mask=column_ok)
    g = tl.load(pick(scales, e) + columns, mask=column_ok, other=0.0).to(tl.float32)
    b = tl.load(pick(shifts, e) + columns, mask=column_ok, other=0.0).to(tl.float32)
    grad_weight = pick(grad_weights, member) + place
    acc = (acc * g[None, :] + total[:, None] * b[None, :]).to(grad_weight.dtype.element_ty)
    if CUT:
        tl.store(grad_weight, acc, mask=ok)
    else:
        tl.store(grad_weight, acc)
    if len(grad_biases) > 0:
        if column_tile == 0:
            grad_bias = pick(grad_biases, member) + rows
            tl.store(grad_bias, total.to(grad_bias.dtype.element_ty), mask=row_ok)


def forward(
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """One (P, L, O) per projection; ``x`` in ``dtype``; arguments as in op.py."""
    num_pairs, length = len(tables.sample), x[0].shape[1]
    with torch.cuda.device_of(x[0]):
        folded = fold(tables, scale, shift, weight, bias, dtype)
        outs = [x[0].new_empty((num_pairs, length, o)) for o in folded.outputs]
        if num_pairs * length:
            _project(x, getattr(tables, rows), tables, folded, outs)
    return outs


def backward(
    grads: Sequence[Tensor],
    x: Sequence[Tensor],
    rows: str,
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """Gradients of x (nothing if not ``needs_x``), scale, shift, weight and bias; zeros where nothing was selected."""
    grad_x: list[Tensor] = []
    with torch.cuda.device_of(x[0]):
        if needs_x:
            folded = fold(tables, scale, shift, weight, bias, x[0].dtype)
            shared = rows == "sample"
            grad_x = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in x]
            if not shared:  # the kernel writes the rows of the pairs alone
                torch._foreach_zero_(grad_x)
            collect(grads, None, folded, tables, grad_x, None if shared else tables.row, by_sample=shared)
        found = grad_weights(grads, None, x, getattr(tables, rows), None, tables, scale, shift, weight, bias)
    return [*grad_x, *found]


def fold(
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dtype: torch.dtype,
) -> Folded:
    """The weights of the experts which have pairs; those of the others are left unwritten."""
    num_experts = len(scale)
    widths = tuple(len(g) for g in scale)
    outputs = tuple(len(w) for w in weight[::num_experts])
    folded = scale[0].new_empty(sum(widths) * sum(outputs), dtype=dtype)
    constant = scale[0].new_empty((num_experts, sum(outputs)), dtype=torch.float32)
    blocks = tuple(triton.cdiv(o, FOLD_ROWS) for o in outputs)
    _fold_kernel[(sum(blocks), num_experts)](
        _alike(weight), _alike(scale), _alike(shift), _alike(bias), tables.expert_offsets, folded, constant,
        WIDTHS=widths, OUTPUTS=outputs, BLOCKS=blocks, TOTAL=sum(outputs), ROWS=FOLD_ROWS, COLUMNS=FOLD_COLUMNS,
    )  # fmt: skip
    return Folded(folded, constant, widths, outputs)


def collect(
    a: Sequence[Tensor],
    a_index: Tensor | None,
    folded: Folded,
    tables: PairTables,
    outs: Sequence[Tensor],
    out_index: Tensor | None = None,
    *,
    by_sample: bool = False,
    transposed: bool = False,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Launch _collect_kernel: its docstring says what it computes. ``outs`` are contiguous."""
    a = [adjacent_channels(t) for t in a]
    residual = None if residual is None else adjacent_channels(residual)
    num_outs = len(outs[0]) if by_sample else len(tables.sample)
    length, total = a[0].shape[1], sum(folded.outputs)
    if num_outs * length == 0:
        return
    widths_out = (total,) if transposed else folded.widths
    residual_strides = (0, 0) if residual is None else residual.stride()[:2]

    def launch(config: dict[str, Any], programs: int) -> None:
        n_tiles = triton.cdiv(max(widths_out), config["TILE_N"])
        num_tiles = triton.cdiv(length, config["TILE_M"]) * n_tiles * num_outs
        _collect_kernel[(min(programs, num_tiles),)](
            tuple(a), *_strides(a), a_index, tuple(outs), out_index, residual, gate,
            tables.expert, tables.num_used, tables.by_sample if by_sample else None, tables.sample_offsets,
            folded.weight, folded.constant, num_outs, *residual_strides,
            WIDTHS=folded.widths, OUTPUTS=folded.outputs, TOTAL=total, L=length, TRANSPOSED=transposed,
            N_TILES=n_tiles, CUT=length % config["TILE_M"] != 0 or any(w % config["TILE_N"] for w in widths_out),
            CUT_K=any(k % config["TILE_K"] for k in (folded.widths if transposed else folded.outputs)),
            **config,
        )  # fmt: skip

    _configured("collect", a[0], (num_outs * length, *folded.widths, *folded.outputs), launch)


def grad_weights(
    grads: Sequence[Tensor],
    grad_index: Tensor | None,
    x: Sequence[Tensor],
    index: Tensor | None,
    gate: Tensor | None,
    tables: PairTables,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of scale, shift, weight and bias, in this order; see _grad_weight_kernel."""
    grads, x = [adjacent_channels(t) for t in grads], [adjacent_channels(t) for t in x]
    num_experts, length = len(scale), x[0].shape[1]
    widths = tuple(len(g) for g in scale)
    outputs = tuple(len(w) for w in weight[::num_experts])
    grad_weight, grad_bias = (
        [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors] for tensors in (weight, bias)
    )

    def launch(config: dict[str, Any], _: int) -> Tensor:
        row_tiles = tuple(triton.cdiv(o, config["TILE_M"]) for o in outputs)
        column_tiles = tuple(triton.cdiv(w, config["TILE_N"]) for w in widths)
        partial = scale[0].new_empty((2, sum(row_tiles), sum(widths)), dtype=torch.float32)
        _grad_weight_kernel[(sum(row_tiles), sum(column_tiles))](
            tuple(grads), *_strides(grads), grad_index, tuple(x), *_strides(x), index, gate, tables.expert_offsets,
            _alike(weight), _alike(scale), _alike(shift), tuple(grad_weight), tuple(grad_bias), partial[0], partial[1],
            WIDTHS=widths, OUTPUTS=outputs, ROW_TILES=row_tiles, COLUMN_TILES=column_tiles,
            SUM_WIDTHS=sum(widths), L=length, CUT_K=length % config["TILE_K"] != 0,
            CUT=any(o % config["TILE_M"] for o in outputs) or any(w % config["TILE_N"] for w in widths),
            **config,
        )  # fmt: skip
        return partial

    partial = _configured("grad_weight", grads[0], (len(tables.sample) * length, *widths, *outputs), launch)
    sums = partial.sum(1)
    affine = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*scale, *shift)]
    torch._foreach_copy_(affine, [*sums[0].split(widths), *sums[1].split(widths)])
    return [*affine, *grad_weight, *grad_bias]


def gate_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: keys and values, and queries, of the official model; odd sizes."""
    official = (1536, 512, 256, 1536, 768, 768, 256)
    yield "K, V bfloat16", functools.partial(_gate_case, torch.bfloat16, official, (1024, 1024), 2304, "row")
    yield "Q bfloat16", functools.partial(_gate_case, torch.bfloat16, (1024,) * 7, (1024,), 2304, "sample")
    yield "K, V float32", functools.partial(_gate_case, torch.float32, official, (1024, 1024), 2304, "row")
    yield "K, V tf32", functools.partial(_gate_case, torch.float32, official, (1024, 1024), 2304, "row", tf32=True)
    yield "odd sizes bfloat16", functools.partial(_gate_case, torch.bfloat16, (1000, 90), (1000,), 2300, "row")


def _gate_case(
    dtype: torch.dtype, widths: Sequence[int], outputs: Sequence[int], length: int, rows: str, tf32: bool = False
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    table = torch.empty(24, dtype=torch.int64, device="meta")
    tables = PairTables(*[table] * 6)
    sources = [empty(8, length, c) for c in (widths[:1] if rows == "sample" else widths)]
    affine, weights = [empty(c) for c in widths], [empty(o, c) for o in outputs for c in widths]
    biases = [empty(o) for o in outputs for _ in widths]
    outs = forward(sources, rows, tables, affine, affine, weights, biases, dtype)
    backward(outs, sources, rows, tables, affine, affine, weights, biases, True)


def _project(x: Sequence[Tensor], index: Tensor, tables: PairTables, folded: Folded, outs: Sequence[Tensor]) -> None:
    x = [adjacent_channels(t) for t in x]
    num_pairs, length = outs[0].shape[:2]

    def launch(config: dict[str, Any], programs: int) -> None:
        tiles = tuple(triton.cdiv(o, config["TILE_N"]) for o in folded.outputs)
        tiles_per_pair = triton.cdiv(length, config["TILE_M"]) * sum(tiles)
        _project_kernel[(min(programs, num_pairs * tiles_per_pair),)](
            tuple(x), *_strides(x), tuple(outs), index, tables.expert, tables.num_used,
            folded.weight, folded.constant, num_pairs,
            WIDTHS=folded.widths, OUTPUTS=folded.outputs, TILES=tiles, TOTAL=sum(folded.outputs), L=length,
            TILES_PER_PAIR=tiles_per_pair,
            CUT=length % config["TILE_M"] != 0 or any(o % config["TILE_N"] for o in folded.outputs),
            CUT_K=any(w % config["TILE_K"] for w in folded.widths),
            **config,
        )  # fmt: skip

    _configured("project", x[0], (num_pairs * length, *folded.widths, *folded.outputs), launch)


def _configured(kernel: str, x: Tensor, sizes: Sequence[int], launch: Callable[[dict[str, Any], int], Any]) -> Any:
    """launch(constants, programs for all multiprocessors) for operands like ``x``; the first size is in tokens."""
    kind, cut = arithmetic(x), any(size % 128 for size in sizes)

    def run(config: Config) -> Any:
        tile_m, tile_n, tile_k, num_warps, num_stages, programs = config
        constants = {"TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": tile_k, "PRECISION": dot_precision()}
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": REGISTERS}
        return launch({**constants, **options}, num_multiprocessors(x) * programs)

    key = (kind, "cut" if cut else "full", bucket(sizes[0]))
    return run(tuned("ragged_linear", kernel, key, CONFIGS[kind, cut], CANDIDATES[kind], run, x.device))


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the rows, and of the tokens."""
    return tuple(t.stride(0) for t in tensors), tuple(t.stride(1) for t in tensors)


def _alike(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Contiguous and of one dtype, so that a kernel can choose among them."""
    return tuple(t.to(tensors[0].dtype).contiguous() for t in tensors)
