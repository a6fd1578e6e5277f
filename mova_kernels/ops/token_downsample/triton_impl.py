"""token_downsample in Triton: what lies between the matrix products of a stage, forward and backward.

The 1x1 convolutions and squeeze-excite are torch's matrix products; each kernel here is one pass over (B, R*R, C). With
x the input, a = conv1 x, c = conv2 SiLU(LN a), v = SE(SiLU(LN c)) and d = conv3 v, a stage is x + LN d. Only x, a, c
and d are kept for the backward pass; every activation is computed again where it is used.

A program owns all channels of its tokens, hence of every LayerNorm. Programs that sum over tokens take several tiles
and store a partial sum each, (B, groups, n, C) fp32, which torch adds up: deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import REGISTERS, adjacent_channels, nan_if_infinite
from .reference import StageWeights

PROGRAMS = 1024  # about how many programs share the tiles of a sum: 3 waves on an H100. Not measured.
# The gradient of the taps has nine sums per program: with 1024 programs they would be 21 MB for an official sample, and
# the kernel reads 9 MB. 160 programs, a few more than an H100 has multiprocessors, store 5 MB.
TAPS_PROGRAMS = 160


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
def _norm_silu_kernel(
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
def _conv_kernel(
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
def _norm_add_kernel(
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
def _norm_add_grad_kernel(
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
    sums += tl.program_id(0).to(tl.int64) * 2 * C
    _store_row(sums, total_weight, 0, C, BLOCK)
    _store_row(sums, total_bias, 1, C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def _gate_grad_kernel(
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
def _norm_silu_grad_kernel(
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
    sums += tl.program_id(0).to(tl.int64) * 2 * C
    _store_row(sums, total_weight, 0, C, BLOCK)
    _store_row(sums, total_bias, 1, C, BLOCK)


@triton.jit(do_not_specialize=["groups", "steps"])
def _conv_grad_kernel(
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
    sums += tl.program_id(0).to(tl.int64) * 2 * C
    _store_row(sums, total_weight, 0, C, BLOCK)
    _store_row(sums, total_bias, 1, C, BLOCK)


@triton.jit
def _with_added(totals, k: tl.constexpr, x):
    """The tuple ``totals`` with x added to its k-th entry."""
    return totals[:k] + (totals[k] + x,) + totals[k + 1 :]  # noqa: RUF005


@triton.jit(do_not_specialize=["groups", "steps"])
def _taps_grad_kernel(
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


# Tokens per tile, by registers: a thread has 16 bytes of channels of each. Not measured.
TILES = {
    _norm_silu_kernel: 4,
    _conv_kernel: 4,
    _norm_add_kernel: 4,
    _norm_add_grad_kernel: 2,
    _gate_grad_kernel: 4,
    _norm_silu_grad_kernel: 2,
    _conv_grad_kernel: 4,
    _taps_grad_kernel: 2,
}


def forward(x: Tensor, resolution: int, w: StageWeights, eps: float, pool: bool) -> tuple[Tensor, ...]:
    """One stage, with the pooling behind it if ``pool``.

    Returns:
        the result, (B, R*R or (R // 2)**2, C) in x's dtype; and for :func:`backward`, in that of the convolutions, a, c
        and d, the mean (B, C), the squeezed mean (B, S) before its SiLU, and the gate (B, C) before its sigmoid.
    """
    x, w = adjacent_channels(x), _with_dense_norms(w)
    num_samples, length, channels = x.shape
    out = x.new_empty(num_samples, (resolution // 2) ** 2 if pool else length, channels)
    launch = functools.partial(_launch, resolution=resolution, eps=eps)
    with torch.cuda.device_of(x):
        a = x.to(w.conv1.dtype) @ w.conv1.flatten(1).mT
        h, c, v = (a.new_empty(x.shape) for _ in range(3))
        launch(_norm_silu_kernel, a, *w.norm1, None, h)
        sums = launch(_conv_kernel, h, _taps(w.conv2), *w.norm2, c, sums=1)
        mean = (sums.sum((1, 2)) / length).to(a.dtype)
        squeezed = F.linear(mean, w.squeeze[0].flatten(1), w.squeeze[1])
        gate = F.linear(F.silu(squeezed), w.excite[0].flatten(1), w.excite[1])
        launch(_norm_silu_kernel, c, *w.norm2, gate, v)
        d = v @ w.conv3.flatten(1).mT
        launch(_norm_add_kernel, x, d, *w.norm3, out, strides=x.stride()[:2], WINDOW=_window(resolution, pool))
    return out, a, c, d, mean, squeezed, gate


def backward(
    grad: Tensor, x: Tensor, w: StageWeights, saved: Sequence[Tensor], resolution: int, eps: float, pool: bool,
    of_weights: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The gradients of x and, if ``of_weights``, of ``w.flat()``, in their dtypes; the same bits at every call."""
    a, c, d, mean, squeezed, gate = saved
    grad, w = adjacent_channels(grad), _with_dense_norms(w)
    launch = functools.partial(_launch, resolution=resolution, eps=eps)
    with torch.cuda.device_of(x):
        grad_x = x.new_empty(x.shape)
        grad_d, v, grad_c, grad_a = (a.new_empty(x.shape) for _ in range(4))
        norm3 = launch(
            _norm_add_grad_kernel, grad, d, w.norm3[0], grad_x, grad_d,
            strides=grad.stride()[:2], sums=2, WINDOW=_window(resolution, pool),
        )  # fmt: skip
        grad_v = grad_d @ w.conv3.flatten(1)
        grad_sigmoid = launch(_gate_grad_kernel, grad_v, c, *w.norm2, gate, v, sums=1).sum((1, 2))
        sigmoid = gate.float().sigmoid()
        grad_gate = (grad_sigmoid * sigmoid * (1 - sigmoid)).to(a.dtype)
        grad_squeezed = torch.ops.aten.silu_backward(grad_gate @ w.excite[0].flatten(1), squeezed)
        grad_mean = grad_squeezed @ w.squeeze[0].flatten(1)
        norm2 = launch(_norm_silu_grad_kernel, grad_v, c, *w.norm2, gate, grad_mean, grad_c, sums=2)
        norm1 = launch(_conv_grad_kernel, grad_c, a, *w.norm1, _taps(w.conv2), grad_a, sums=2)
        if x.dtype == a.dtype:  # one rounding, and one pass less
            grad_x.flatten(0, 1).addmm_(grad_a.flatten(0, 1), w.conv1.flatten(1))
        else:
            grad_x += grad_a @ w.conv1.flatten(1)
        if not of_weights:
            return grad_x, []

        # Norms are summed one by one, since what a torch op returns must not share memory.
        norms = [(t[:, :, 0].sum((0, 1)), t[:, :, 1].sum((0, 1))) for t in (norm1, norm2, norm3)]
        grads = StageWeights(
            conv1=_weight_grad(grad_a, x.to(a.dtype)),
            norm1=norms[0],
            conv2=launch(_taps_grad_kernel, grad_c, *w.norm1, a, sums=9).sum((0, 1)).mT.contiguous(),
            norm2=norms[1],
            squeeze=(grad_squeezed.mT @ mean, grad_squeezed.sum(0)),
            excite=(grad_gate.mT @ F.silu(squeezed), grad_gate.sum(0)),
            conv3=_weight_grad(grad_d, v),
            norm3=norms[2],
        )
        return grad_x, [g.reshape(p.shape).to(p.dtype) for g, p in zip(grads.flat(), w.flat(), strict=True)]


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: names, and calls of the launchers on meta tensors.

    The official stages, and autocast (tokens, norms and taps stay fp32) with channels and tokens that fill no tile.
    """
    for products, others, channels, resolution, pool in (
        (torch.bfloat16, torch.bfloat16, 1024, 48, True),
        (torch.float32, torch.float32, 1024, 24, False),
        (torch.float16, torch.float32, 1500, 5, True),
    ):
        name = f"{products} C={channels} R={resolution}".removeprefix("torch.")
        yield name, functools.partial(_compile_case, products, others, channels, resolution, pool)


def _compile_case(products: torch.dtype, others: torch.dtype, channels: int, resolution: int, pool: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = products) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    square, bias, norm = empty(channels, channels, 1, 1), empty(channels), (empty(channels, dtype=others),) * 2
    squeeze = empty(channels // 4, channels, 1, 1), empty(channels // 4)
    excite = empty(channels, channels // 4, 1, 1), bias
    taps = empty(channels, 1, 3, 3, dtype=others)
    w = StageWeights(square, norm, taps, norm, squeeze, excite, square, norm)
    x = empty(2, resolution**2, channels, dtype=others)
    out, *saved = forward(x, resolution, w, 1e-5, pool)
    backward(out, x, w, saved, resolution, 1e-5, pool, True)


def _with_dense_norms(w: StageWeights) -> StageWeights:
    (g1, b1), (g2, b2), (g3, b3) = ((g.contiguous(), b.contiguous()) for g, b in (w.norm1, w.norm2, w.norm3))
    return w._replace(norm1=(g1, b1), norm2=(g2, b2), norm3=(g3, b3))


def _taps(conv2: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C): the channels adjacent."""
    return conv2.flatten(1).mT.contiguous()


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """(B, L, C') and (B, L, C) -> (C', C): the gradient of a 1x1 convolution's weight."""
    return grad.flatten(0, 1).mT @ x.flatten(0, 1)


def _window(resolution: int, pool: bool) -> int:
    """The side of the windows: torch's adaptive pooling to R // 2 has windows of 3 at steps of 2 for an odd R."""
    return 2 + resolution % 2 if pool else 1


def _split(kernel, num_samples: int, num_tokens: int) -> tuple[int, int]:
    """How many tiles a program of a sum takes, and how many programs a sample has."""
    tiles = triton.cdiv(num_tokens, TILES[kernel])
    programs = TAPS_PROGRAMS if kernel is _taps_grad_kernel else PROGRAMS
    steps = triton.cdiv(tiles, max(1, programs // max(1, num_samples)))
    return steps, triton.cdiv(tiles, steps)


def _launch(
    kernel, *tensors: Tensor | None, resolution: int, eps: float, strides: tuple[int, ...] = (), sums: int = 0,
    **constants: int,
) -> Tensor:  # fmt: skip
    """Run ``kernel`` over the tokens of its last tensor; returns its sums over tokens, (B, groups, sums, C) fp32."""
    result = tensors[-1]
    assert result is not None
    num_samples, num_tokens, channels = result.shape
    steps, groups = _split(kernel, num_samples, num_tokens) if sums else (1, triton.cdiv(num_tokens, TILES[kernel]))
    partial = result.new_empty((num_samples, groups, sums, channels), dtype=torch.float32)
    if result.numel():
        block = triton.next_power_of_2(channels)
        kernel[(num_samples * groups,)](
            *tensors, *([partial] if sums else []), *strides, groups, steps, eps,
            R=resolution, C=channels, BLOCK=block, TILE=TILES[kernel], **constants,
            # 16 bytes of a row per thread, up to 8 warps: a sum over tokens stays within a thread.
            num_warps=min(8, max(1, block * result.element_size() // 512)), maxnreg=REGISTERS,
        )  # fmt: skip
    return partial
