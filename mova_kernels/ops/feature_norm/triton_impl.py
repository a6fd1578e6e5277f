"""feature_norm in Triton: one launch resamples and normalises the features of all experts.

The arguments of a kernel are tuples with one entry per expert; a program finds its expert from its program id. It
handles ``STEPS`` tiles of tokens of one row of that expert, one after the other: neighbouring tokens read the same
input tokens, which then come from the L1 cache.

A tile is (TILE / BLOCK tokens, BLOCK channels), where BLOCK is the expert's number of channels rounded up to a power of
two: experts of different widths have tiles of the same size, and the code exists once per BLOCK, not once per expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import REGISTERS, adjacent_channels, nan_if_infinite, pick

# Not measured. 16 elements per thread, so that the four taps of a bf16 tile are eight loads of 16 bytes in flight; four
# tiles per program, so that a single sample with three experts still gives each multiprocessor several programs.
TILE = 2048
STEPS = 4
ELEMENTS_PER_WARP = 512
NARROWEST = 256  # BLOCK of all experts with fewer channels: one warp's 16-byte loads of bf16


@triton.jit
def _number(disguised):
    """The inverse of :func:`_unspecialised`."""
    return (disguised >> 1) - 1


@triton.jit
def _expert(starts):
    """The expert of this program, and the program's place among those of the expert."""
    program = tl.program_id(0)
    expert = 0
    for e in tl.static_range(1, len(starts)):
        expert += (program >= _number(starts[e])).to(tl.int32)
    return expert, program - _number(pick(starts, expert))


@triton.jit
def _row(m, expert, table, table_starts):
    """Which row of the expert's features row ``m`` of its result comes from."""
    row = m
    if table is not None:
        row = tl.load(table + _number(pick(table_starts, expert)) + m)
    return row


@triton.jit
def _taps(d, IN, OUT: tl.constexpr):
    """What output ``d`` of an axis reads: an input, its weight, that of the next one, and whether that one is read.

    csrc/feature_resample/taps.h has the derivation: positions are exact integers, a weight is rounded once.
    """
    position = tl.minimum(tl.maximum((2 * d + 1) * IN - OUT, 0), 2 * OUT * (IN - 1))
    low = position // (2 * OUT)
    beyond = position - low * (2 * OUT)
    weight_low = tl.div_rn((2 * OUT - beyond).to(tl.float32), tl.full(d.shape, 2 * OUT, tl.float32))
    weight_next = tl.div_rn(beyond.to(tl.float32), tl.full(d.shape, 2 * OUT, tl.float32))
    last = tl.where(IN == OUT, 0, IN - 1)
    return low, weight_low, weight_next, low < last


@triton.jit
def _first_beyond(i, IN, OUT: tl.constexpr):
    """The first output whose position is at least input ``i``."""
    return tl.where(i <= 0, 0, tl.minimum(((2 * i + 1) * OUT + IN - 1) // (2 * IN), OUT))


@triton.jit
def _readers(i, IN, OUT: tl.constexpr):
    """Input ``i`` is read by the outputs from the first to, not including, the second."""
    same = IN == OUT
    return tl.where(same, i, _first_beyond(i - 1, IN, OUT)), tl.where(same, i + 1, _first_beyond(i + 1, IN, OUT))


@triton.jit
def _weight(d, i, IN, OUT: tl.constexpr):
    """The weight of input ``i`` in output ``d``, which reads it."""
    position = tl.minimum(tl.maximum((2 * d + 1) * IN - OUT, 0), 2 * OUT * (IN - 1))
    distance = tl.abs(position - 2 * OUT * i)
    return tl.div_rn((2 * OUT - distance).to(tl.float32), tl.full(d.shape, 2 * OUT, tl.float32))


@triton.jit
def _load(x, tokens, stride, channels, mask):
    """(tokens, channels) of one row in fp32, zeros outside of the mask."""
    pointers = x + tokens.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, tokens, C, channels, mask, value):
    """As :func:`_load`, to a contiguous row."""
    pointers = x + tokens.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(pointers, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _normalise_tiles(
    x, y, rstd, stride, first_tile, in_h, in_w, C, eps,
    H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = TILE // BLOCK
    channels = tl.arange(0, BLOCK)
    for tile in range(first_tile, tl.minimum(first_tile + STEPS, tl.cdiv(H * W, TOKENS))):
        tokens = tile * TOKENS + tl.arange(0, TOKENS)
        mask = (tokens < H * W)[:, None] & (channels < C)[None, :]
        i, above, below, two_rows = _taps(tokens // W, in_h, H)
        j, left, right, two_columns = _taps(tokens % W, in_w, W)
        tap = i * in_w + j
        down, across = mask & two_rows[:, None], mask & two_columns[:, None]
        total = (above * left)[:, None] * _load(x, tap, stride, channels, mask)
        total += (above * right)[:, None] * _load(x, tap + 1, stride, channels, across)
        total += (below * left)[:, None] * _load(x, tap + in_w, stride, channels, down)
        total += (below * right)[:, None] * _load(x, tap + in_w + 1, stride, channels, down & across)
        mean = tl.sum(total, 1) / C
        centred = tl.where(mask, total - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / C
        scale = nan_if_infinite(tl.rsqrt(variance + eps), variance)
        _store(y, tokens, C, channels, mask, centred * scale[:, None])
        tl.store(rstd + tokens, scale, mask=tokens < H * W)


@triton.jit
def _forward_kernel(
    features, results, rstds, table, table_starts, rows_fit, num_rows, row_strides, token_strides, heights, widths, eps,
    programs, starts,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr, EACH_BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """results and rstds; nothing is written for a negative row."""
    expert, place = _expert(starts)
    m = (place // _number(pick(programs, expert))).to(tl.int64)
    row = _row(m, expert, table, table_starts)
    if table is not None:
        beyond = row >= _number(pick(num_rows, expert))
        tl.store(rows_fit, 0, mask=beyond)
        if beyond | (row < 0):
            return
    C = pick(CHANNELS, expert)
    x = pick(features, expert) + row * pick(row_strides, expert)
    y = pick(results, expert) + m * H * W * C
    rstd = pick(rstds, expert) + m * H * W
    stride = pick(token_strides, expert)
    in_h, in_w = _number(pick(heights, expert)), _number(pick(widths, expert))
    first_tile = place % _number(pick(programs, expert)) * STEPS
    for b in tl.static_range(len(EACH_BLOCK)):
        if pick(BLOCKS, expert) == EACH_BLOCK[b]:
            _normalise_tiles(x, y, rstd, stride, first_tile, in_h, in_w, C, eps, H, W, EACH_BLOCK[b], TILE, STEPS)


@triton.jit
def _grad_norm_tiles(
    grad, y, rstd, grad_y, stride, first_tile, L, C, BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr
):
    TOKENS: tl.constexpr = TILE // BLOCK
    channels = tl.arange(0, BLOCK)
    for tile in range(first_tile, tl.minimum(first_tile + STEPS, tl.cdiv(L, TOKENS))):
        tokens = tile * TOKENS + tl.arange(0, TOKENS)
        mask = (tokens < L)[:, None] & (channels < C)[None, :]
        g = _load(grad, tokens, stride, channels, mask)
        y_tile = _load(y, tokens, C, channels, mask)
        scale = tl.load(rstd + tokens, mask=tokens < L, other=0.0)
        mean, along = tl.sum(g, 1) / C, tl.sum(g * y_tile, 1) / C
        g = scale[:, None] * (g - mean[:, None] - y_tile * along[:, None])
        _store(grad_y, tokens, C, channels, mask, g)


@triton.jit
def _grad_norm_kernel(
    grads, results, rstds, targets, table, table_starts, row_strides, token_strides, resampled, programs, starts,
    L: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr, EACH_BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The gradient through the normalisation, to row m of a buffer or, where sizes are equal, to the features' row."""
    expert, place = _expert(starts)
    m = (place // _number(pick(programs, expert))).to(tl.int64)
    row = _row(m, expert, table, table_starts)
    if row < 0:
        return
    C = pick(CHANNELS, expert)
    grad = pick(grads, expert) + m * pick(row_strides, expert)
    y = pick(results, expert) + m * L * C
    rstd = pick(rstds, expert) + m * L
    grad_y = pick(targets, expert) + tl.where(_number(pick(resampled, expert)) != 0, m, row) * L * C
    stride = pick(token_strides, expert)
    first_tile = place % _number(pick(programs, expert)) * STEPS
    for b in tl.static_range(len(EACH_BLOCK)):
        if pick(BLOCKS, expert) == EACH_BLOCK[b]:
            _grad_norm_tiles(grad, y, rstd, grad_y, stride, first_tile, L, C, EACH_BLOCK[b], TILE, STEPS)


@triton.jit
def _gather_tiles(
    grad_y, grad_x, first_tile, in_h, in_w, C,
    H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = TILE // BLOCK
    channels = tl.arange(0, BLOCK)
    for tile in range(first_tile, tl.minimum(first_tile + STEPS, tl.cdiv(in_h * in_w, TOKENS))):
        tokens = tile * TOKENS + tl.arange(0, TOKENS)
        mask = (tokens < in_h * in_w)[:, None] & (channels < C)[None, :]
        i, j = tokens // in_w, tokens % in_w
        first_i, last_i = _readers(i, in_h, H)
        first_j, last_j = _readers(j, in_w, W)
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
        for down in range(tl.max(last_i - first_i, 0)):
            out_i = first_i + down
            weight_i = _weight(out_i, i, in_h, H)
            for across in range(tl.max(last_j - first_j, 0)):
                out_j = first_j + across
                weight = weight_i * _weight(out_j, j, in_w, W)
                read = mask & ((out_i < last_i) & (out_j < last_j))[:, None]
                total += weight[:, None] * _load(grad_y, out_i * W + out_j, C, channels, read)
        _store(grad_x, tokens, C, channels, mask, total)


@triton.jit
def _gather_kernel(
    grads, targets, table, table_starts, heights, widths, programs, starts,
    H: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr, EACH_BLOCK: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The adjoint of the resampling: an input token sums over the base tokens that read it, in their order."""
    expert, place = _expert(starts)
    m = (place // _number(pick(programs, expert))).to(tl.int64)
    row = _row(m, expert, table, table_starts)
    if row < 0:
        return
    C = pick(CHANNELS, expert)
    in_h, in_w = _number(pick(heights, expert)), _number(pick(widths, expert))
    grad_y = pick(grads, expert) + m * H * W * C
    grad_x = pick(targets, expert) + row * in_h * in_w * C
    first_tile = place % _number(pick(programs, expert)) * STEPS
    for b in tl.static_range(len(EACH_BLOCK)):
        if pick(BLOCKS, expert) == EACH_BLOCK[b]:
            _gather_tiles(grad_y, grad_x, first_tile, in_h, in_w, C, H, W, EACH_BLOCK[b], TILE, STEPS)


def forward(
    features: Sequence[Tensor], rows: Sequence[Tensor | None], sizes: Sequence[int], eps: float
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """(R_e, h_e*w_e, C_e) and (M_e,) int64 or None per expert; h_0, w_0, ..., H, W.

    Returns results (M_e, H*W, C_e), their 1 / sqrt(var + eps) (M_e, H*W) fp32, and, if rows are given, () int32:
    whether all of them exist. One that does not is not read.
    """
    heights, widths, out_h, out_w = _sizes(sizes)
    features = tuple(adjacent_channels(x) for x in features)
    counts = [x.shape[0] if r is None else r.shape[0] for x, r in zip(features, rows, strict=True)]
    results = [x.new_empty((m, out_h * out_w, x.shape[2])) for x, m in zip(features, counts, strict=True)]
    rstds = [y.new_empty(y.shape[:2], dtype=torch.float32) for y in results]
    with torch.cuda.device_of(features[0]):
        table, table_starts = _table(rows, counts)
        rows_fit = None if table is None else torch.ones((), dtype=torch.int32, device=table.device)
        num_rows = _unspecialised(x.shape[0] for x in features)
        _launch(
            _forward_kernel,
            (
                features, tuple(results), tuple(rstds), table, table_starts, rows_fit, num_rows, *_strides(features),
                _unspecialised(heights), _unspecialised(widths), eps,
            ),
            counts, [out_h * out_w] * len(counts), [x.shape[2] for x in features],
            H=out_h, W=out_w,
        )  # fmt: skip
    return results, rstds, rows_fit


def backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], rstds: Sequence[Tensor], rows: Sequence[Tensor | None],
    num_rows: Sequence[int], sizes: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients of the features, (R_e, h_e*w_e, C_e), contiguous; bit for bit the same at every call."""
    heights, widths, out_h, out_w = _sizes(sizes)
    grads = tuple(adjacent_channels(g) for g in grads)
    results, rstds = tuple(y.contiguous() for y in results), tuple(r.contiguous() for r in rstds)
    counts, channels = [y.shape[0] for y in results], [y.shape[2] for y in results]
    tokens = [h * w for h, w in zip(heights, widths, strict=True)]
    resampled = tuple(size != (out_h, out_w) for size in zip(heights, widths, strict=True))
    grad_features = tuple(
        # zeros for rows of which no result was made
        y.new_empty((n, t, y.shape[2])) if r is None else y.new_zeros((n, t, y.shape[2]))
        for y, r, n, t in zip(results, rows, num_rows, tokens, strict=True)
    )
    # The gradient through the normalisation is stored, rounded to the dtype as in torch: four tokens of the features
    # read each token of it, and computing it again would take each of them two tensors and two sums over channels.
    buffers = tuple(
        torch.empty_like(y) if some else grad for y, grad, some in zip(results, grad_features, resampled, strict=True)
    )
    with torch.cuda.device_of(grads[0]):
        table, table_starts = _table(rows, counts)
        _launch(
            _grad_norm_kernel,
            (grads, results, rstds, buffers, table, table_starts, *_strides(grads), _unspecialised(resampled)),
            counts, [out_h * out_w] * len(counts), channels,
            L=out_h * out_w,
        )  # fmt: skip
        _launch(
            _gather_kernel,
            (buffers, grad_features, table, table_starts, _unspecialised(heights), _unspecialised(widths)),
            [m if some else 0 for m, some in zip(counts, resampled, strict=True)], tokens, channels,
            H=out_h, W=out_w,
        )  # fmt: skip
    return list(grad_features)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: names, and calls of the launchers on meta tensors.

    The official experts, which have every BLOCK; a single one without rows, whose channels fill no tile.
    """
    channels = (1536, 512, 256, 1536, 768, 768, 256)
    sides = (37, 64, 64, 48, 14, 37, 64)
    yield "official bfloat16", functools.partial(_compile_case, torch.bfloat16, channels, sides, 48, True)
    yield "official float32", functools.partial(_compile_case, torch.float32, channels, sides, 48, True)
    yield "odd float16", functools.partial(_compile_case, torch.float16, (33,), (5,), 7, False)


def _compile_case(dtype: torch.dtype, channels: Sequence[int], sides: Sequence[int], out: int, with_rows: bool) -> None:
    experts = len(channels)
    features = [torch.empty(2, s * s, c, dtype=dtype, device="meta") for s, c in zip(sides, channels, strict=True)]
    rows = [torch.empty(2, dtype=torch.int64, device="meta") if with_rows else None] * experts
    sizes = [side for s in (*sides, out) for side in (s, s)]
    results, rstds, _ = forward(features, rows, sizes, 1e-5)
    backward(results, results, rstds, rows, [2] * experts, sizes)


def _sizes(sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """The heights and widths of the experts' grids, and those of the base grid."""
    return tuple(sizes[:-2:2]), tuple(sizes[1:-2:2]), sizes[-2], sizes[-1]


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(t.stride(0) for t in tensors), tuple(t.stride(1) for t in tensors)


def _table(rows: Sequence[Tensor | None], counts: Sequence[int]) -> tuple[Tensor | None, tuple[int, ...]]:
    """All rows one after the other, None if none are given, and where each expert's begin.

    There is no pointer per expert, because Triton compiles again when the alignment of one of them to 16 bytes changes,
    as that of slices does.
    """
    starts = _unspecialised(accumulate(counts[:-1], initial=0))
    device = next((r.device for r in rows if r is not None), None)
    if device is None:
        return None, starts
    indices = [torch.arange(m, device=device) if r is None else r for r, m in zip(rows, counts, strict=True)]
    return torch.cat(indices), starts


def _unspecialised(numbers: Iterable[int]) -> tuple[int, ...]:
    """Numbers that change from batch to batch, encoded as odd ones from 3, for which Triton compiles once.

    Triton compiles again when an integer in a tuple becomes 1 or divisible by 16, or ceases to be, and
    ``do_not_specialize`` does not reach into tuples.
    """
    return tuple(2 * n + 3 for n in numbers)


def _launch(
    kernel, arguments: tuple, counts: Sequence[int], tokens: Sequence[int], channels: Sequence[int], **sizes
) -> None:
    """``counts[e]`` rows of ``tokens[e]`` tokens per expert."""
    blocks = tuple(max(NARROWEST, triton.next_power_of_2(c)) for c in channels)
    tile = max(TILE, *blocks)
    programs = tuple(triton.cdiv(t, tile // block * STEPS) for t, block in zip(tokens, blocks, strict=True))
    *starts, total = accumulate((m * p for m, p in zip(counts, programs, strict=True)), initial=0)
    if total:
        kernel[(total,)](
            *arguments, _unspecialised(programs), _unspecialised(starts),
            CHANNELS=tuple(channels), BLOCKS=blocks, EACH_BLOCK=tuple(sorted(set(blocks))),
            TILE=tile, STEPS=STEPS, num_warps=tile // ELEMENTS_PER_WARP, maxnreg=REGISTERS, **sizes,
        )  # fmt: skip
