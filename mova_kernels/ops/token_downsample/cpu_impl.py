"""token_downsample in C++: torch's matrix products, and csrc/token_downsample/token_downsample.h for what lies between.

What is kept for the backward pass is what ``triton_impl`` keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _compiled
from ..._linear import product
from .reference import StageWeights


def _step(name: str) -> Callable[..., None]:
    return _compiled.function(
        f"mk_token_downsample_{name}",
        "x grad outer weight bias taps gate grad_mean y partial sums",
        "B R C num_sums outer_stride_sample outer_stride_token pool dtype eps:double",
    )


NORM_SILU, CONV, NORM_ADD = _step("norm_silu"), _step("conv"), _step("norm_add")
NORM_ADD_BWD, GATE_BWD, NORM_SILU_BWD = _step("norm_add_bwd"), _step("gate_bwd"), _step("norm_silu_bwd")
CONV_BWD, ADD_BWD = _step("conv_bwd"), _step("add_bwd")
_NUM_SUMS = {CONV: 1, NORM_ADD_BWD: 2, GATE_BWD: 1, NORM_SILU_BWD: 2, CONV_BWD: 11}  # C++ refuses others


def forward(x: Tensor, resolution: int, w: StageWeights, eps: float, pool: bool) -> tuple[Tensor, ...]:
    """One stage: what op.py says of ``_fwd``."""
    run = functools.partial(step, resolution=resolution, eps=eps)
    norm1, norm2, norm3 = _norms(w)
    num_samples, length, channels = x.shape
    out = x.new_empty(num_samples, (resolution // 2) ** 2 if pool else length, channels)
    a = product(x.to(w.conv1.dtype), w.conv1.flatten(1))
    h, c = torch.empty_like(a), torch.empty_like(a)
    run(NORM_SILU, norm1, a, h)
    mean = (run(CONV, norm2, h, c, taps=_taps(w.conv2)) / length).to(a.dtype)
    squeezed = F.linear(mean, w.squeeze[0].flatten(1), w.squeeze[1])
    gate = F.linear(F.silu(squeezed), w.excite[0].flatten(1), w.excite[1])
    v = h  # whose memory is free now
    run(NORM_SILU, norm2, c, v, gate=gate.float().sigmoid())
    d = product(v, w.conv3.flatten(1))
    run(NORM_ADD, norm3, d.to(x.dtype), out, outer=_compiled.adjacent_channels(x), pool=pool)
    return out, a, c, d, mean, squeezed, gate


def backward(
    grad: Tensor, x: Tensor, w: StageWeights, saved: Sequence[Tensor], resolution: int, eps: float, pool: bool,
    of_weights: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The gradients: what op.py says of ``_bwd``."""
    run = functools.partial(step, resolution=resolution, eps=eps)
    a, c, d, mean, squeezed, gate = (t.contiguous() for t in saved)
    norm1, norm2, norm3 = _norms(w)
    grad, sigmoid = _compiled.adjacent_channels(grad), gate.float().sigmoid()

    grad_d = x.new_empty(x.shape)
    sums3 = run(NORM_ADD_BWD, norm3, d.to(x.dtype), grad_d, outer=grad, pool=pool)
    grad_d = grad_d.to(a.dtype)
    grad_v, v = product(grad_d, w.conv3.flatten(1).mT), torch.empty_like(a)
    grad_gate = run(GATE_BWD, norm2, c, v, grad=grad_v, gate=sigmoid) * sigmoid * (1 - sigmoid)
    grad_gate = grad_gate.to(a.dtype)
    grad_squeezed = torch.ops.aten.silu_backward(grad_gate @ w.excite[0].flatten(1), squeezed)
    grad_mean = (grad_squeezed @ w.squeeze[0].flatten(1)).float()
    grad_conv3 = _weight_grad(grad_d, v) if of_weights else None
    grad_c, grad_a = grad_v, v  # memory at hand is cheaper than what the system would have to map
    sums2 = run(NORM_SILU_BWD, norm2, c, grad_c, grad=grad_v, gate=sigmoid, grad_mean=grad_mean)
    sums1 = run(CONV_BWD, norm1, a, grad_a, grad=grad_c, taps=_taps(w.conv2))
    grad_x = product(grad_a, w.conv1.flatten(1).mT).to(x.dtype)
    run(ADD_BWD, norm1, grad_x, grad_x, outer=grad, pool=pool)
    if grad_conv3 is None:
        return grad_x, []

    # Rows are copied, since what a torch op returns must not share memory.
    norms = [(t[0].clone(), t[1].clone()) for t in (sums1, sums2, sums3)]
    grads = StageWeights(
        conv1=_weight_grad(grad_a, x.to(a.dtype)),
        norm1=norms[0],
        conv2=sums1[2:].mT.contiguous(),
        norm2=norms[1],
        squeeze=(grad_squeezed.mT @ mean, grad_squeezed.sum(0)),
        excite=(grad_gate.mT @ F.silu(squeezed), grad_gate.sum(0)),
        conv3=grad_conv3,
        norm3=norms[2],
    )
    return grad_x, [g.reshape(p.shape).to(p.dtype) for g, p in zip(grads.flat(), w.flat(), strict=True)]


def step(
    which: Callable[..., None], norm: tuple[Tensor, Tensor], x: Tensor, y: Tensor, *, resolution: int, eps: float,
    grad: Tensor | None = None, outer: Tensor | None = None, taps: Tensor | None = None, gate: Tensor | None = None,
    grad_mean: Tensor | None = None, pool: bool = False,
) -> Tensor:  # fmt: skip
    """One pass; the tensors are described in the header. Returns the sums over tokens, (B, C) or (num_sums, C) fp32."""
    num_samples, _, channels = x.shape
    weight, bias = norm
    num_sums = _NUM_SUMS.get(which, 0)
    partial = x.new_empty((num_samples, resolution, num_sums, channels), dtype=torch.float32)
    sums = x.new_empty((num_samples if num_sums == 1 else num_sums, channels), dtype=torch.float32)
    which(
        x=x, grad=grad, outer=outer, weight=weight, bias=bias, taps=taps, gate=gate, grad_mean=grad_mean, y=y,
        partial=partial, sums=sums, B=num_samples, R=resolution, C=channels, num_sums=num_sums, pool=pool,
        dtype=x.dtype, eps=eps,
    )  # fmt: skip
    return sums


def _norms(w: StageWeights) -> list[tuple[Tensor, Tensor]]:
    return [(g.float().contiguous(), b.float().contiguous()) for g, b in (w.norm1, w.norm2, w.norm3)]


def _taps(conv2: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C) fp32: the channels adjacent."""
    return conv2.flatten(1).float().mT.contiguous()


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """(B, L, N) and (B, L, K) -> (N, K): the gradient of a 1x1 convolution's weight."""
    return product(grad.flatten(0, 1).mT, x.flatten(0, 1).mT)
