"""token_downsample in Triton: what lies between the matrix products of a stage, forward and backward.

The 1x1 convolutions and squeeze-excite are torch's matrix products; triton_kernels.py has the rest. With x the input,
a = conv1 x, c = conv2 SiLU(LN a), v = SE(SiLU(LN c)) and d = conv3 v, a stage is x + LN d. Only x, a, c and d are kept
for the backward pass; every activation is computed again where it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..._triton.device import REGISTERS, adjacent_channels
from .reference import StageWeights
from .triton_kernels import (
    conv_grad_kernel,
    conv_kernel,
    gate_grad_kernel,
    norm_add_grad_kernel,
    norm_add_kernel,
    norm_silu_grad_kernel,
    norm_silu_kernel,
    taps_grad_kernel,
)

PROGRAMS = 1024  # about how many programs share the tiles of a sum: 3 waves on an H100. Not measured.
# The gradient of the taps has nine sums per program: with 1024 programs they would be 21 MB for an official sample, and
# the kernel reads 9 MB. 160 programs, a few more than an H100 has multiprocessors, store 5 MB.
TAPS_PROGRAMS = 160
# Tokens per tile, by registers: a thread has 16 bytes of channels of each. Not measured.
TILES = {
    norm_silu_kernel: 4,
    conv_kernel: 4,
    norm_add_kernel: 4,
    norm_add_grad_kernel: 2,
    gate_grad_kernel: 4,
    norm_silu_grad_kernel: 2,
    conv_grad_kernel: 4,
    taps_grad_kernel: 2,
}


def forward(x: Tensor, resolution: int, w: StageWeights, eps: float, pool: bool) -> tuple[Tensor, ...]:
    """One stage: what op.py says of ``_fwd``."""
    x, w = adjacent_channels(x), _with_dense_norms(w)
    num_samples, length, channels = x.shape
    out = x.new_empty(num_samples, (resolution // 2) ** 2 if pool else length, channels)
    launch = functools.partial(_launch, resolution=resolution, eps=eps)
    with torch.cuda.device_of(x):
        a = x.to(w.conv1.dtype) @ w.conv1.flatten(1).mT
        h, c, v = (a.new_empty(x.shape) for _ in range(3))
        launch(norm_silu_kernel, a, *w.norm1, None, h)
        sums = launch(conv_kernel, h, _taps(w.conv2), *w.norm2, c, sums=1)
        mean = (sums.sum((1, 2)) / length).to(a.dtype)
        squeezed = F.linear(mean, w.squeeze[0].flatten(1), w.squeeze[1])
        gate = F.linear(F.silu(squeezed), w.excite[0].flatten(1), w.excite[1])
        launch(norm_silu_kernel, c, *w.norm2, gate, v)
        d = v @ w.conv3.flatten(1).mT
        launch(norm_add_kernel, x, d, *w.norm3, out, strides=x.stride()[:2], WINDOW=_window(resolution, pool))
    return out, a, c, d, mean, squeezed, gate


def backward(
    grad: Tensor, x: Tensor, w: StageWeights, saved: Sequence[Tensor], resolution: int, eps: float, pool: bool,
    of_weights: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The gradients: what op.py says of ``_bwd``."""
    a, c, d, mean, squeezed, gate = saved
    grad, w = adjacent_channels(grad), _with_dense_norms(w)
    launch = functools.partial(_launch, resolution=resolution, eps=eps)
    with torch.cuda.device_of(x):
        grad_x = x.new_empty(x.shape)
        grad_d, v, grad_c, grad_a = (a.new_empty(x.shape) for _ in range(4))
        norm3 = launch(
            norm_add_grad_kernel, grad, d, w.norm3[0], grad_x, grad_d,
            strides=grad.stride()[:2], sums=2, WINDOW=_window(resolution, pool),
        )  # fmt: skip
        grad_v = grad_d @ w.conv3.flatten(1)
        grad_sigmoid = launch(gate_grad_kernel, grad_v, c, *w.norm2, gate, v, sums=1).sum((1, 2))
        sigmoid = gate.float().sigmoid()
        grad_gate = (grad_sigmoid * sigmoid * (1 - sigmoid)).to(a.dtype)
        grad_squeezed = torch.ops.aten.silu_backward(grad_gate @ w.excite[0].flatten(1), squeezed)
        grad_mean = grad_squeezed @ w.squeeze[0].flatten(1)
        norm2 = launch(norm_silu_grad_kernel, grad_v, c, *w.norm2, gate, grad_mean, grad_c, sums=2)
        norm1 = launch(conv_grad_kernel, grad_c, a, *w.norm1, _taps(w.conv2), grad_a, sums=2)
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
            conv2=launch(taps_grad_kernel, grad_c, *w.norm1, a, sums=9).sum((0, 1)).mT.contiguous(),
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
    programs = TAPS_PROGRAMS if kernel is taps_grad_kernel else PROGRAMS
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
