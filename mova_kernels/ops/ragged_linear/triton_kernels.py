"""The Triton kernels of ragged_linear and gated_combine: products of the pairs with their expert's folded weights.

The affine part of an expert is folded into its weights first, in one launch for all experts and projections which skips
experts without pairs: V_e = W_e diag(g_e), and the constant W_e b_e + c_e. The V_e lie one after the other in a buffer,
(O, C_e) each, where O counts the outputs of all projections.

The products are persistent: a fixed number of programs share the tiles of all pairs, and find in the pairs' tables on
the device what belongs together. A tile sums in the order of the tables, so the bits are the same at every call.
Tensors of all experts or projections come as tuples. Offsets within one expert's weights fit into 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.device import pick


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
def _add_dot(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b. In full fp32 there are no matrix instructions, and all of K would be one chain of additions."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        return acc + tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


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
        acc = _add_dot(acc, a_now, b_now, PRECISION)
        a += TILE_K * stride_ak
        b += TILE_K * stride_bk
    return acc


@triton.jit
def fold_kernel(
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


@triton.jit(do_not_specialize=["num_pairs"])  # changes from batch to batch and must not cause a compilation
def project_kernel(
    sources, source_strides, token_strides, outs, index, expert, num_valid, folded, constant, num_pairs,
    WIDTHS: tl.constexpr, OUTPUTS: tl.constexpr, TILES: tl.constexpr, TOTAL: tl.constexpr, L: tl.constexpr,
    TILES_PER_PAIR: tl.constexpr, CUT: tl.constexpr, CUT_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """outs[i][p] = x V^T + constant, where x is row index[p] of the source of the pair's expert; zeros for padding."""
    valid = tl.load(num_valid)
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
        if p < valid:
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
def collect_kernel(
    a, a_strides, token_strides, a_index, outs, out_index, residual, gate, expert, num_valid, by_sample, sample_offsets,
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
    valid = tl.load(num_valid)
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
            stop = tl.minimum(target + 1, valid)
            if target < valid:
                if (inside // M_TILES) * TILE_N >= pick(WIDTHS, tl.load(expert + target)):
                    stop = start  # a wider expert's columns
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
        elif target < valid:
            e = tl.load(expert + target)
            out_row = target
            if out_index is not None:
                out_row = tl.load(out_index + target)
            width_out = pick(WIDTHS, e)
            ok = row_ok[:, None] & (columns < width_out)[None, :]
            out = pick(outs, e) + (out_row * L + rows[:, None]) * width_out + columns[None, :]
            tl.store(out, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def sum_kernel(
    grads, grad_strides, token_strides, grad_index, num_valid, sums,
    OUTPUTS: tl.constexpr, TILES: tl.constexpr, TOTAL: tl.constexpr, L: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums (P, SPLITS, O): dy of a pair, summed over a part of its tokens; nothing is written for padding."""
    part = tl.program_id(0).to(tl.int64)
    p = part // SPLITS
    if p >= tl.load(num_valid):
        return
    i, tile = _locate(tl.program_id(1), TILES)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = columns < pick(OUTPUTS, i)
    grad_row = p
    if grad_index is not None:
        grad_row = tl.load(grad_index + p)
    grad = pick(grads, i) + grad_row * pick(grad_strides, i) + columns[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(L, SPLITS * ROWS)):
        rows = (step * SPLITS + part % SPLITS) * ROWS + tl.arange(0, ROWS)
        ok = (rows < L)[:, None] & column_ok[None, :]
        acc += tl.load(grad + rows[:, None].to(tl.int64) * pick(token_strides, i), mask=ok, other=0.0).to(tl.float32)
    tl.store(sums + part * TOTAL + _sum_before(OUTPUTS, i) + columns, tl.sum(acc, 0), mask=column_ok)


@triton.jit
def grad_weight_kernel(
    grads, grad_strides, grad_token_strides, grad_index, sources, source_strides, token_strides, index, gate, offsets,
    sums, weights, scales, shifts, grad_weights, grad_biases, partial_scale, partial_shift,
    WIDTHS: tl.constexpr, OUTPUTS: tl.constexpr, ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr,
    SUM_WIDTHS: tl.constexpr, TOTAL: tl.constexpr, SPLITS: tl.constexpr, L: tl.constexpr,
    CUT: tl.constexpr, CUT_K: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's grad_weight, and what it adds to the gradients of the affine part.

    With dV = dy^T x and s = the sum of gate * sums over the expert's pairs: dW = dV diag(g) + s b^T, db = W^T s and
    dg_c = sum over rows of dV W. x and dy are rows index[p] and grad_index[p] (None: p). Zeros without pairs.
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
    first, last = tl.load(offsets + e), tl.load(offsets + e + 1)
    for p in range(first, last):
        grad_row = p
        if grad_index is not None:
            grad_row = tl.load(grad_index + p)
        x_row = p
        if index is not None:
            x_row = tl.load(index + p)
        grad_now = grad + grad_row * pick(grad_strides, i)
        x_now = x + x_row * pick(source_strides, e)
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
            acc = _add_dot(acc, tl.trans(dy), t, PRECISION)
            grad_now += TILE_K * grad_stride
            x_now += TILE_K * x_stride

    total = tl.zeros((TILE_M,), tl.float32)
    parts = tl.arange(0, SPLITS)[:, None] * TOTAL + _sum_before(OUTPUTS, i) + rows[None, :]
    for p in range(first, last):
        of_pair = tl.sum(tl.load(sums + p * (SPLITS * TOTAL) + parts, mask=row_ok[None, :], other=0.0), 0)
        if gate is not None:
            of_pair *= tl.load(gate + p)
        total += of_pair
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
