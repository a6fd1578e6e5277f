"""The kernels of token_downsample: each is one pass over (B, R*R, C).

A program owns all channels of its tokens, hence of every LayerNorm. Programs that sum over tokens take several tiles
and store a partial sum each, (B, groups, n, C) fp32, which torch adds up: deterministic. The docstrings write
a = conv1 x, c = conv2 SiLU(LN a), v = SE(SiLU(LN c)) and d = conv3 v.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..._triton.device import nan_if_infinite


@triton.jit
def _place(groups, steps):
    """sample and first tile of this program."""
    program = tl.program_id(0)
    return (program // groups).to(tl.int64), program % groups * steps


@triton.jit
def _load(x, rows, ok, stride, C: tl.constexpr, BLOCK: tl.constexpr):
    """All channels of these rows, (TILE, BLOCK) in fp32; zeros where there is nothing."""
    columns = tl.arange(0, BLOCK)
    mask = ok[:, None] & (columns < C)[None, :]
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, y, rows, ok, C: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = ok[:, None] & (columns < C)[None, :]
    tl.store(x + rows[:, None] * C + columns[None, :], y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(x, i, C: tl.constexpr, BLOCK: tl.constexpr):
    """Row i of (n, C) as (BLOCK,) in fp32."""
    columns = tl.arange(0, BLOCK)
    return tl.load(x + i * C + columns, mask=columns < C, other=0.0).to(tl.float32)


@triton.jit
def _store_row(x, y, i, C: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(x + i * C + columns, y, mask=columns < C)


@triton.jit
def _store_norm_grad(sums, of_weight, of_bias, C: tl.constexpr, BLOCK: tl.constexpr):
    """This program's part of the gradients of a norm's weight and bias, in (programs, 2, C)."""
    sums += tl.program_id(0).to(tl.int64) * 2 * C
    _store_row(sums, of_weight, 0, C, BLOCK)
    _store_row(sums, of_bias, 1, C, BLOCK)


@triton.jit
def _standardised(x, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """Each row with mean 0 and variance 1, and the factor that made it so; zeros behind the last channel."""
    centred = x - (tl.sum(x, 1) / C)[:, None]
    centred = tl.where((tl.arange(0, BLOCK) < C)[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1) / C
    factor = nan_if_infinite(1.0 / tl.sqrt_rn(variance + eps), variance)
    return centred * factor[:, None], factor


@triton.jit
def _norm_grad(grad, x, factor, weight, C: tl.constexpr):
    """The gradient of LN's input from that of its output; x and factor are from _standardised."""
    grad = grad * weight[None, :]
    return factor[:, None] * (grad - (tl.sum(grad, 1) / C)[:, None] - x * (tl.sum(grad * x, 1) / C)[:, None])


@triton.jit
def _silu_grad(grad, x):
    sigmoid = tl.sigmoid(x)
    return grad * sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _neighbour(x, sample, tokens, down, right, R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens that lie ``down`` and ``right`` of these; zeros outside of the grid."""
    i, j = tokens // R + down, tokens % R + right
    inside = (i >= 0) & (i < R) & (j >= 0) & (j < R) & (tokens < R * R)
    return _load(x, sample * (R * R) + i * R + j, inside, C, C, BLOCK)


@triton.jit
def _convolved(
    x, taps, sample, tokens, sign: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The depthwise 3x3 convolution of x with taps (9, C) at these tokens; with sign -1 its gradient's.

    Three taps are in flight at a time; all nine need too many registers.
    """
    acc = tl.zeros((tokens.shape[0], BLOCK), tl.float32)
    for i in range(3):
        for j in tl.static_range(3):
            there = _neighbour(x, sample, tokens, sign * (i - 1), sign * (j - 1), R, C, BLOCK)
            acc += there * _load_row(taps, i * 3 + j, C, BLOCK)[None, :]
    return acc


@triton.jit(do_not_specialize=["groups", "steps"])
def norm_silu_kernel(
    x, weight, bias, gate, y, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = SiLU(LN x), times the sigmoid of gate (B, C) if there is one."""
    L: tl.constexpr = R * R
    sample, first = _place(groups, steps)
    tokens = first * TILE + tl.arange(0, TILE)
    rows, ok = sample * L + tokens, tokens < L
    out, _ = _standardised(_load(x, rows, ok, C, C, BLOCK), eps, C, BLOCK)
    out = out * _load_row(weight, 0, C, BLOCK)[None, :] + _load_row(bias, 0, C, BLOCK)[None, :]
    out = out * tl.sigmoid(out)
    if gate is not None:
        out *= tl.sigmoid(_load_row(gate, sample, C, BLOCK))[None, :]
    _store(y, out, rows, ok, C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def conv_kernel(
    x, taps, weight, bias, y, sums, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = depthwise 3x3 of x with taps (9, C); sums (B, groups, C) of SiLU(LN y) over tokens."""
    L: tl.constexpr = R * R
    sample, first = _place(groups, steps)
    weight_row, bias_row = _load_row(weight, 0, C, BLOCK), _load_row(bias, 0, C, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(first, first + steps):
        tokens = tile * TILE + tl.arange(0, TILE)
        rows, ok = sample * L + tokens, tokens < L
        acc = _convolved(x, taps, sample, tokens, 1, R, C, BLOCK)
        _store(y, acc, rows, ok, C, BLOCK)
        normed, _ = _standardised(acc, eps, C, BLOCK)
        normed = normed * weight_row[None, :] + bias_row[None, :]
        total += tl.sum(tl.where(ok[:, None], normed * tl.sigmoid(normed), 0.0), 0)
    _store_row(sums, total, tl.program_id(0).to(tl.int64), C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def norm_add_kernel(
    x, d, weight, bias, y, stride_xb, stride_xl, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """y = x + LN d, averaged over windows: 1 of 1x1, or pooling to R // 2 by windows of 2x2 or, for an odd R, 3x3."""
    STEP: tl.constexpr = 1 if WINDOW == 1 else 2
    SIDE: tl.constexpr = R // STEP
    sample, first = _place(groups, steps)
    tokens = first * TILE + tl.arange(0, TILE)
    ok = tokens < SIDE * SIDE
    weight_row, bias_row = _load_row(weight, 0, C, BLOCK), _load_row(bias, 0, C, BLOCK)
    acc = tl.zeros((TILE, BLOCK), tl.float32)
    for k in range(WINDOW * WINDOW):
        source = (tokens // SIDE * STEP + k // WINDOW) * R + tokens % SIDE * STEP + k % WINDOW
        normed, _ = _standardised(_load(d, sample * (R * R) + source, ok, C, C, BLOCK), eps, C, BLOCK)
        acc += normed * weight_row[None, :] + bias_row[None, :]
        acc += _load(x + sample * stride_xb, source.to(tl.int64), ok, stride_xl, C, BLOCK)
    _store(y, acc / (WINDOW * WINDOW), sample * (SIDE * SIDE) + tokens, ok, C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def norm_add_grad_kernel(
    grad, d, weight, grad_x, grad_d, sums, stride_gb, stride_gl, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The gradients of x (of the sum's part alone) and d; sums (B, groups, 2, C) of those of weight and bias."""
    STEP: tl.constexpr = 1 if WINDOW == 1 else 2
    SIDE: tl.constexpr = R // STEP
    L: tl.constexpr = R * R
    sample, first = _place(groups, steps)
    weight_row = _load_row(weight, 0, C, BLOCK)
    total_weight = tl.zeros((BLOCK,), tl.float32)
    total_bias = tl.zeros((BLOCK,), tl.float32)
    for tile in range(first, first + steps):
        tokens = tile * TILE + tl.arange(0, TILE)
        rows, ok = sample * L + tokens, tokens < L
        g = tl.zeros((TILE, BLOCK), tl.float32)
        # Windows of 3 overlap: they may share their first and last row and column.
        SHARED: tl.constexpr = 2 if WINDOW == 3 else 1
        for k in tl.static_range(SHARED * SHARED):
            i, j = tokens // R // STEP - k // SHARED, tokens % R // STEP - k % SHARED
            inside = ok & (i >= 0) & (i < SIDE) & (tokens // R < i * STEP + WINDOW)
            inside = inside & (j >= 0) & (j < SIDE) & (tokens % R < j * STEP + WINDOW)
            g += _load(grad + sample * stride_gb, (i * SIDE + j).to(tl.int64), inside, stride_gl, C, BLOCK)
        g /= WINDOW * WINDOW
        _store(grad_x, g, rows, ok, C, BLOCK)
        normed, factor = _standardised(_load(d, rows, ok, C, C, BLOCK), eps, C, BLOCK)
        _store(grad_d, _norm_grad(g, normed, factor, weight_row, C), rows, ok, C, BLOCK)
        total_weight += tl.sum(g * normed, 0)
        total_bias += tl.sum(g, 0)
    _store_norm_grad(sums, total_weight, total_bias, C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def gate_grad_kernel(
    grad, c, weight, bias, gate, v, sums, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """v = SiLU(LN c) sigmoid(gate) again; sums (B, groups, C) of SiLU(LN c) grad over tokens, grad being that of v."""
    L: tl.constexpr = R * R
    sample, first = _place(groups, steps)
    weight_row, bias_row = _load_row(weight, 0, C, BLOCK), _load_row(bias, 0, C, BLOCK)
    sigmoid = tl.sigmoid(_load_row(gate, sample, C, BLOCK))
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(first, first + steps):
        tokens = tile * TILE + tl.arange(0, TILE)
        rows, ok = sample * L + tokens, tokens < L
        normed, _ = _standardised(_load(c, rows, ok, C, C, BLOCK), eps, C, BLOCK)
        normed = normed * weight_row[None, :] + bias_row[None, :]
        normed = normed * tl.sigmoid(normed)
        _store(v, normed * sigmoid[None, :], rows, ok, C, BLOCK)
        total += tl.sum(normed * _load(grad, rows, ok, C, C, BLOCK), 0)
    _store_row(sums, total, tl.program_id(0).to(tl.int64), C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def norm_silu_grad_kernel(
    grad, c, weight, bias, gate, grad_mean, grad_c, sums, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of c, grad being that of v and grad_mean (B, C) that of the mean which squeeze-excite takes;
    sums (B, groups, 2, C) of those of weight and bias."""
    L: tl.constexpr = R * R
    sample, first = _place(groups, steps)
    weight_row, bias_row = _load_row(weight, 0, C, BLOCK), _load_row(bias, 0, C, BLOCK)
    sigmoid = tl.sigmoid(_load_row(gate, sample, C, BLOCK))
    mean_row = _load_row(grad_mean, sample, C, BLOCK) / L
    total_weight = tl.zeros((BLOCK,), tl.float32)
    total_bias = tl.zeros((BLOCK,), tl.float32)
    for tile in range(first, first + steps):
        tokens = tile * TILE + tl.arange(0, TILE)
        rows, ok = sample * L + tokens, tokens < L
        g = _load(grad, rows, ok, C, C, BLOCK) * sigmoid[None, :] + mean_row[None, :]
        normed, factor = _standardised(_load(c, rows, ok, C, C, BLOCK), eps, C, BLOCK)
        g = _silu_grad(tl.where(ok[:, None], g, 0.0), normed * weight_row[None, :] + bias_row[None, :])
        _store(grad_c, _norm_grad(g, normed, factor, weight_row, C), rows, ok, C, BLOCK)
        total_weight += tl.sum(g * normed, 0)
        total_bias += tl.sum(g, 0)
    _store_norm_grad(sums, total_weight, total_bias, C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def conv_grad_kernel(
    grad, a, weight, bias, taps, grad_a, sums, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient of a, grad being that of c; sums (B, groups, 2, C) of those of weight and bias."""
    L: tl.constexpr = R * R
    sample, first = _place(groups, steps)
    weight_row, bias_row = _load_row(weight, 0, C, BLOCK), _load_row(bias, 0, C, BLOCK)
    total_weight = tl.zeros((BLOCK,), tl.float32)
    total_bias = tl.zeros((BLOCK,), tl.float32)
    for tile in range(first, first + steps):
        tokens = tile * TILE + tl.arange(0, TILE)
        rows, ok = sample * L + tokens, tokens < L
        g = _convolved(grad, taps, sample, tokens, -1, R, C, BLOCK)
        normed, factor = _standardised(_load(a, rows, ok, C, C, BLOCK), eps, C, BLOCK)
        g = _silu_grad(g, normed * weight_row[None, :] + bias_row[None, :])
        _store(grad_a, _norm_grad(g, normed, factor, weight_row, C), rows, ok, C, BLOCK)
        total_weight += tl.sum(g * normed, 0)
        total_bias += tl.sum(g, 0)
    _store_norm_grad(sums, total_weight, total_bias, C, BLOCK)


@triton.jit
def _with_added(totals, k: tl.constexpr, x):
    """The tuple ``totals`` with x added to its k-th entry."""
    return totals[:k] + (totals[k] + x,) + totals[k + 1 :]  # noqa: RUF005


@triton.jit(do_not_specialize=["groups", "steps"])
def taps_grad_kernel(
    grad, weight, bias, a, sums, groups, steps, eps,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """sums (B, groups, 9, C) of the gradients of the taps, grad being that of c."""
    L: tl.constexpr = R * R
    sample, first = _place(groups, steps)
    weight_row, bias_row = _load_row(weight, 0, C, BLOCK), _load_row(bias, 0, C, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    totals = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for tile in range(first, first + steps):
        tokens = tile * TILE + tl.arange(0, TILE)
        h, _ = _standardised(_load(a, sample * L + tokens, tokens < L, C, C, BLOCK), eps, C, BLOCK)
        h = h * weight_row[None, :] + bias_row[None, :]
        h = h * tl.sigmoid(h)
        for k in tl.static_range(9):
            there = _neighbour(grad, sample, tokens, 1 - k // 3, 1 - k % 3, R, C, BLOCK)
            totals = _with_added(totals, k, tl.sum(there * h, 0))
    sums += tl.program_id(0).to(tl.int64) * 9 * C
    for k in tl.static_range(9):
        _store_row(sums, totals[k], k, C, BLOCK)
