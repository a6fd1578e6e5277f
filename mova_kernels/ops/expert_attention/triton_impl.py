"""expert_attention in Triton: flash attention per (pair, head), with the rotary embedding and its gradient.

Tensors are (P, L, H*D) with free strides of pairs and tokens; log-sum-exp and the sums of the backward pass are
(P, H, L) fp32. A program handles one tile of tokens of one (pair, head); the tiles of a head are neighbours, so that
its keys and values stay in the L2 cache.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton.device import (
    REGISTERS,
    VERSION,
    adjacent_channels,
    arithmetic,
    dot_precision,
    stages_with_fences,
    target,
)
from ..._triton.tuning import bucket, tuned
from . import triton_wide
from .triton_tiles import load_rows, load_tile, place, rotated, scorable, store_tile, tile_of

LOG2_E = tl.constexpr(math.log2(math.e))

# (arithmetic, head width) -> for each kernel: own tile, tile of the loop, warps, pipeline stages. "forward" and
# "grad_q" own queries and loop over keys, "grad_kv" the other way round. Not measured; tools/compile_gate.py holds them
# to the shared memory and registers of sm_80, sm_90 and sm_100. Their rules:
# - wgmma (sm_90) needs tiles of 64 rows; grad_kv in TF32 at width 128 has smaller ones, as it would spill registers;
# - on sm_100 Triton 3.6 computes fp32 scores of rotated queries in TF32 from 64 rows on, whatever precision was asked
#   for; _launch cuts these tiles to 32 rows before Triton 3.9, where the fault is gone (3.7 and 3.8 were not tried);
# - at width 32 the backward kernels have no tiles of 64 and 128 with two stages: Triton 3.6 reads out of bounds there
#   (triton-lang/triton#10573).
CONFIGS = {
    ("16-bit", 32): {"forward": (128, 128, 8, 3), "grad_kv": (64, 64, 4, 2), "grad_q": (128, 64, 8, 3)},
    ("16-bit", 64): {"forward": (128, 128, 8, 3), "grad_kv": (128, 64, 8, 2), "grad_q": (128, 64, 8, 3)},
    ("16-bit", 128): {"forward": (128, 64, 8, 3), "grad_kv": (64, 64, 8, 2), "grad_q": (64, 64, 8, 2)},
    ("tf32", 32): {"forward": (128, 64, 8, 2), "grad_kv": (64, 32, 4, 2), "grad_q": (64, 32, 4, 2)},
    ("tf32", 64): {"forward": (128, 64, 8, 2), "grad_kv": (64, 32, 8, 1), "grad_q": (64, 32, 4, 2)},
    ("tf32", 128): {"forward": (64, 32, 8, 2), "grad_kv": (32, 32, 8, 1), "grad_q": (64, 16, 8, 2)},
    ("ieee", 32): {"forward": (64, 32, 4, 2), "grad_kv": (32, 32, 4, 2), "grad_q": (64, 32, 4, 2)},
    ("ieee", 64): {"forward": (64, 32, 8, 2), "grad_kv": (32, 32, 8, 1), "grad_q": (32, 32, 4, 1)},
    ("ieee", 128): {"forward": (64, 16, 8, 2), "grad_kv": (32, 32, 8, 1), "grad_q": (32, 32, 8, 1)},
}


def _candidates(kind: str, width: int, name: str) -> list[tuple[int, ...]]:
    """What a search tries (_triton/tuning.py), within the rules above."""
    tiles = {"16-bit": (64, 128), "tf32": (64, 128), "ieee": (32, 64)}[kind]
    steps = {"16-bit": (32, 64, 128), "tf32": (16, 32, 64), "ieee": (16, 32, 64)}[kind]
    backward_at_32 = width == 32 and name != "forward"
    every = itertools.product(tiles, steps, (4, 8), (1, 2, 3))
    return [c for c in every if not (backward_at_32 and {c[0], c[1]} == {64, 128} and c[3] == 2)]


CANDIDATES = {key: {name: _candidates(*key, name) for name in defaults} for key, defaults in CONFIGS.items()}
ROWS = 64  # tokens per program of the kernels without a loop


@triton.jit
def _rotate_kernel(
    x, cos, sin, y, num_valid, stride_xp, stride_xl, stride_yp, stride_yl, H, num_tiles,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = rope(x), with NaN for tokens whose scores may overflow; nothing is written for padding."""
    TILES_CUT: tl.constexpr = L % TILE != 0
    pair, head, rows, padding = place(num_valid, H, num_tiles, TILE)
    if padding:
        return
    x_tile = load_tile(tile_of(x, pair, head, rows, stride_xp, stride_xl, D), rows, L, TILES_CUT)
    turned = scorable(rotated(x_tile, cos, sin, rows, L, D, False, TILES_CUT), x_tile.dtype)
    store_tile(tile_of(y, pair, head, rows, stride_yp, stride_yl, D), turned, rows, L, TILES_CUT)


@triton.jit
def _forward_kernel(
    q, k, v, cos, sin, out, lse, num_valid,
    stride_qp, stride_ql, stride_kp, stride_kl, stride_vp, stride_vl, stride_op, stride_ol, H, num_tiles, scale,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse from q as projected and k rotated; zeros for padding. triton_wide.py knows wide queries by lse."""
    TILES_CUT: tl.constexpr = L % TILE != 0
    STEPS_CUT: tl.constexpr = L % STEP != 0
    pair, head, rows, padding = place(num_valid, H, num_tiles, TILE)
    o_tile = tile_of(out, pair, head, rows, stride_op, stride_ol, D)
    lse_row = lse + (pair * H + head) * L + rows
    if padding:
        store_tile(o_tile, tl.zeros((TILE, D), tl.float32), rows, L, TILES_CUT)
        tl.store(lse_row, tl.zeros((TILE,), tl.float32), mask=rows < L)
        return
    q_tile = load_tile(tile_of(q, pair, head, rows, stride_qp, stride_ql, D), rows, L, TILES_CUT)
    q_tile = scorable(rotated(q_tile, cos, sin, rows, L, D, False, TILES_CUT), q_tile.dtype).to(q_tile.dtype)

    columns = tl.arange(0, STEP)
    k_tile = tile_of(k, pair, head, columns, stride_kp, stride_kl, D)
    v_tile = tile_of(v, pair, head, columns, stride_vp, stride_vl, D)
    k_step, v_step = STEP * tl.cast(stride_kl, tl.int64), STEP * tl.cast(stride_vl, tl.int64)
    row_max = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, D), tl.float32)
    for start in range(0, L, STEP):
        scores = tl.dot(q_tile, tl.trans(load_tile(k_tile, start + columns, L, STEPS_CUT)), input_precision=PRECISION)
        if STEPS_CUT:
            scores = tl.where((start + columns < L)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        probabilities = tl.exp2(scores * scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        total = total * rescale + tl.sum(probabilities, 1)
        v_now = load_tile(v_tile, start + columns, L, STEPS_CUT)
        acc = tl.dot(probabilities.to(v_now.dtype), v_now, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
        k_tile += k_step
        v_tile += v_step
    result = acc / total[:, None]
    store_tile(o_tile, result, rows, L, TILES_CUT)
    # A sum of values may overflow although their mean does not. NaN hands such a query to triton_wide.py.
    fits = tl.sum(result * 0.0, 1) == 0.0
    tl.store(lse_row, tl.where(fits, (row_max + tl.log2(total)) / LOG2_E, float("nan")), mask=rows < L)


@triton.jit
def _delta_kernel(
    grad, out, delta, num_valid, stride_gp, stride_gl, stride_op, stride_ol, H, num_tiles,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """delta = sum over channels of grad * out, (P, H, L); nothing is written for padding."""
    TILES_CUT: tl.constexpr = L % TILE != 0
    pair, head, rows, padding = place(num_valid, H, num_tiles, TILE)
    if padding:
        return
    grad_tile = load_tile(tile_of(grad, pair, head, rows, stride_gp, stride_gl, D), rows, L, TILES_CUT).to(tl.float32)
    out_tile = load_tile(tile_of(out, pair, head, rows, stride_op, stride_ol, D), rows, L, TILES_CUT).to(tl.float32)
    tl.store(delta + (pair * H + head) * L + rows, tl.sum(grad_tile * out_tile, 1), mask=rows < L)


@triton.jit
def _grad_kv_kernel(
    q, k, v, grad, lse, delta, cos, sin, grad_k, grad_v, num_valid,
    stride_qp, stride_ql, stride_kp, stride_kl, stride_vp, stride_vl, stride_gp, stride_gl,
    stride_dp, stride_dl, H, num_tiles, scale, root,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of grad_k and grad_v, summed over queries in their order; q and k are rotated; zeros for padding."""
    TILES_CUT: tl.constexpr = L % TILE != 0
    STEPS_CUT: tl.constexpr = L % STEP != 0
    pair, head, rows, padding = place(num_valid, H, num_tiles, TILE)
    grad_k_tile = tile_of(grad_k, pair, head, rows, stride_dp, stride_dl, D)
    grad_v_tile = tile_of(grad_v, pair, head, rows, stride_dp, stride_dl, D)
    if padding:
        store_tile(grad_k_tile, tl.zeros((TILE, D), tl.float32), rows, L, TILES_CUT)
        store_tile(grad_v_tile, tl.zeros((TILE, D), tl.float32), rows, L, TILES_CUT)
        return
    k_tile = load_tile(tile_of(k, pair, head, rows, stride_kp, stride_kl, D), rows, L, TILES_CUT)
    v_tile = load_tile(tile_of(v, pair, head, rows, stride_vp, stride_vl, D), rows, L, TILES_CUT)

    columns = tl.arange(0, STEP)
    q_tile = tile_of(q, pair, head, columns, stride_qp, stride_ql, D)
    g_tile = tile_of(grad, pair, head, columns, stride_gp, stride_gl, D)
    q_step, g_step = STEP * tl.cast(stride_ql, tl.int64), STEP * tl.cast(stride_gl, tl.int64)
    statistics = (pair * H + head) * L + columns
    acc_k = tl.zeros((TILE, D), tl.float32)
    acc_v = tl.zeros((TILE, D), tl.float32)
    for start in range(0, L, STEP):
        q_now = load_tile(q_tile, start + columns, L, STEPS_CUT)
        g_now = load_tile(g_tile, start + columns, L, STEPS_CUT)
        # Behind the last query q and grad are zeros, which add nothing whatever the weights: no mask is needed.
        lse_now = load_rows(lse + start + statistics, start + columns, L, STEPS_CUT) * LOG2_E
        delta_now = load_rows(delta + start + statistics, start + columns, L, STEPS_CUT)
        scores = tl.dot(k_tile, tl.trans(q_now), input_precision=PRECISION)
        weights = tl.exp2(scores * scale - lse_now[None, :])
        acc_v = tl.dot(weights.to(g_now.dtype), g_now, acc_v, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(g_now), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta_now[None, :])
        acc_k = tl.dot(grad_scores.to(q_now.dtype), q_now, acc_k, input_precision=PRECISION)
        q_tile += q_step
        g_tile += g_step
    store_tile(grad_v_tile, acc_v, rows, L, TILES_CUT)
    store_tile(grad_k_tile, rotated(acc_k * root, cos, sin, rows, L, D, True, TILES_CUT), rows, L, TILES_CUT)


@triton.jit
def _grad_q_kernel(
    q, k, v, grad, lse, delta, cos, sin, grad_q, num_valid,
    stride_qp, stride_ql, stride_kp, stride_kl, stride_vp, stride_vl, stride_gp, stride_gl,
    stride_dp, stride_dl, H, num_tiles, scale, root,
    L: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of grad_q, summed over keys in their order; q and k are rotated; zeros for padding."""
    TILES_CUT: tl.constexpr = L % TILE != 0
    STEPS_CUT: tl.constexpr = L % STEP != 0
    pair, head, rows, padding = place(num_valid, H, num_tiles, TILE)
    grad_q_tile = tile_of(grad_q, pair, head, rows, stride_dp, stride_dl, D)
    if padding:
        store_tile(grad_q_tile, tl.zeros((TILE, D), tl.float32), rows, L, TILES_CUT)
        return
    q_tile = load_tile(tile_of(q, pair, head, rows, stride_qp, stride_ql, D), rows, L, TILES_CUT)
    g_tile = load_tile(tile_of(grad, pair, head, rows, stride_gp, stride_gl, D), rows, L, TILES_CUT)
    statistics = (pair * H + head) * L + rows
    lse_row = load_rows(lse + statistics, rows, L, TILES_CUT) * LOG2_E
    delta_row = load_rows(delta + statistics, rows, L, TILES_CUT)

    columns = tl.arange(0, STEP)
    k_tile = tile_of(k, pair, head, columns, stride_kp, stride_kl, D)
    v_tile = tile_of(v, pair, head, columns, stride_vp, stride_vl, D)
    k_step, v_step = STEP * tl.cast(stride_kl, tl.int64), STEP * tl.cast(stride_vl, tl.int64)
    acc = tl.zeros((TILE, D), tl.float32)
    for start in range(0, L, STEP):
        k_now = load_tile(k_tile, start + columns, L, STEPS_CUT)
        v_now = load_tile(v_tile, start + columns, L, STEPS_CUT)
        scores = tl.dot(q_tile, tl.trans(k_now), input_precision=PRECISION)
        if STEPS_CUT:
            scores = tl.where((start + columns < L)[None, :], scores, float("-inf"))
        weights = tl.exp2(scores * scale - lse_row[:, None])
        grad_weights = tl.dot(g_tile, tl.trans(v_now), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta_row[:, None])
        acc = tl.dot(grad_scores.to(k_now.dtype), k_now, acc, input_precision=PRECISION)
        k_tile += k_step
        v_tile += v_step
    store_tile(grad_q_tile, rotated(acc * root, cos, sin, rows, L, D, True, TILES_CUT), rows, L, TILES_CUT)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(P, L, H*D) x 3, fp32 tables (L, D), (1,) int64 or None -> out (P, L, H*D), log-sum-exp (P, H, L) fp32."""
    q, k, v = (adjacent_channels(t) for t in (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], num_heads, q.shape[1]), dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(q):
            # Keys are rotated once, ahead: in the loop every tile of queries would do it again (18 times at 2304
            # tokens; counted, 40 % more instructions), and the copies into shared memory could not be asynchronous.
            # Queries are rotated where they are used, which is once.
            unrotated, k = k, _rotated(k, cos, sin, num_heads, num_valid)
            tensors = (q, k, v, cos, sin, out, lse, num_valid)
            _launch(_forward_kernel, "forward", tensors, (q, k, v, out), num_heads, (_log2_scale(q, num_heads),))
            triton_wide.forward(q, unrotated, v, cos, sin, out, lse, num_heads, num_valid)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    num_heads: int, num_valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, (P, L, H*D), contiguous; bit for bit the same at every call."""
    grad, q, k, v, out = (adjacent_channels(t) for t in (grad, q, k, v, out))
    cos, sin, lse = cos.contiguous(), sin.contiguous(), lse.contiguous()
    grad_q, grad_k, grad_v = (q.new_empty(q.shape) for _ in range(3))
    if grad_q.numel():
        with torch.cuda.device_of(q):
            delta = torch.empty_like(lse)
            _launch_rows(_delta_kernel, (grad, out, delta, num_valid), (grad, out), num_heads)
            unrotated = q, k
            q, k = (_rotated(t, cos, sin, num_heads, num_valid) for t in unrotated)
            scales = (_log2_scale(q, num_heads), (q.shape[2] // num_heads) ** -0.5)
            operands = (q, k, v, grad, lse, delta, cos, sin)
            strided = (q, k, v, grad, grad_q)  # the gradients have the same strides
            _launch(_grad_kv_kernel, "grad_kv", (*operands, grad_k, grad_v, num_valid), strided, num_heads, scales)
            _launch(_grad_q_kernel, "grad_q", (*operands, grad_q, num_valid), strided, num_heads, scales)
            results = (grad_q, grad_k, grad_v)
            triton_wide.backward(*unrotated, v, grad, lse, cos, sin, *results, num_heads, num_valid)
    return grad_q, grad_k, grad_v


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: names, and calls of the launchers on meta tensors.

    The official grid has 2304 tokens, which every tile divides; 2300 compiles the masks, too.
    """
    bfloat16, float32 = torch.bfloat16, torch.float32
    for dtype, width, length, tf32 in (
        *((dtype, width, 2304, False) for dtype in (bfloat16, float32) for width in (32, 64, 128)),
        *((dtype, 64, 2300, False) for dtype in (bfloat16, float32)),
        (float32, 64, 2304, True),
    ):
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        yield f"{name} D={width} L={length}", functools.partial(_compile_case, dtype, width, length, tf32)


def _compile_case(dtype: torch.dtype, width: int, length: int, tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = tf32
    x = torch.empty(2, length, 2 * width, dtype=dtype, device="meta")
    table = torch.empty(length, width, device="meta")
    lse = torch.empty(2, 2, length, device="meta")
    num_valid = torch.empty(1, dtype=torch.int64, device="meta")
    forward(x, x, x, table, table, 2, num_valid)
    backward(x, x, x, x, x, lse, table, table, 2, num_valid)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_valid: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    _launch_rows(_rotate_kernel, (x, cos, sin, y, num_valid), (x, y), num_heads)
    return y


def _log2_scale(q: Tensor, num_heads: int) -> float:
    """The factor of a score in the argument of exp2."""
    return (q.shape[2] // num_heads) ** -0.5 * math.log2(math.e)


def _launch_rows(kernel, tensors, strided: tuple[Tensor, ...], num_heads: int) -> None:
    num_pairs, length, channels = strided[0].shape
    strides = [s for t in strided for s in t.stride()[:2]]
    num_tiles = triton.cdiv(length, ROWS)
    kernel[(num_tiles * num_heads * num_pairs,)](
        *tensors, *strides, num_heads, num_tiles,
        L=length, D=channels // num_heads, TILE=ROWS, maxnreg=REGISTERS,
    )  # fmt: skip


def _launch(kernel, name: str, tensors, strided: tuple[Tensor, ...], num_heads: int, scales: tuple[float, ...]) -> None:
    x = strided[0]
    num_pairs, length, channels = x.shape
    strides = [s for t in strided for s in t.stride()[:2]]
    kind = arithmetic(x), channels // num_heads

    def launch(config: tuple[int, ...]) -> None:
        tile, step, num_warps, num_stages = config
        if length <= step and VERSION < (3, 9) and target() >= 100:
            # Where the loop goes round once, Triton 3.6 stores an operand over scores in tensor memory that other warps
            # may still be reading (triton-lang/triton#10263). Four warps have lanes of their own.
            num_warps = 4
        if name == "forward" and kind[0] == "ieee" and VERSION < (3, 9) and target() >= 100:
            tile = min(tile, 32)
        if name == "grad_kv" and length % step:  # the masks of a pipelined loop do not fit into its registers
            num_stages = 1
        num_tiles = triton.cdiv(length, tile)
        kernel[(num_tiles * num_heads * num_pairs,)](
            *tensors, *strides, num_heads, num_tiles, *scales,
            L=length, D=channels // num_heads, TILE=tile, STEP=step,
            PRECISION=dot_precision(),
            num_warps=num_warps, num_stages=stages_with_fences(num_stages, kind[0]), maxnreg=REGISTERS,
        )  # fmt: skip

    key, default, candidates = (*kind, bucket(length)), CONFIGS[kind][name], CANDIDATES[kind][name]
    launch(tuned("expert_attention", name, key, default, candidates, launch, x.device))
