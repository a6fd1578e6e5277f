"""swiglu_norm in C++: packs the arguments for csrc/swiglu_norm/swiglu_norm.h."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _compiled

_fwd = _compiled.function(
    "mk_swiglu_norm_fwd",
    "gate up weight bias y mean rstd",
    "B L width F gate_stride_sample gate_stride_token up_stride_sample up_stride_token eps:double dtype",
)
_bwd = _compiled.function(
    "mk_swiglu_norm_bwd",
    "grad gate up weight mean rstd grad_gate grad_up sums grad_weight grad_bias",
    "B L width F blocks grad_stride_sample grad_stride_token"
    " gate_stride_sample gate_stride_token up_stride_sample up_stride_token dtype",
)

# The gradients of weight and bias are summed in up to BLOCKS blocks of tokens, which threads share.
BLOCKS, LEAST_TOKENS = 128, 16


def forward(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, eps: float, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, WIDTH) x 2, (WIDTH,) x 2 -> out (B, L, WIDTH), contiguous; mean and 1/deviation (B, L) fp32."""
    dtype, common = gate.dtype, _common_dtype(gate, up)
    gate, up = (_compiled.adjacent_channels(t.to(common)) for t in (gate, up))
    weight, bias = _parameter(weight), _parameter(bias)
    out = _compiled.empty(gate, *gate.shape)
    mean, rstd = (gate.new_empty(gate.shape[:2], dtype=torch.float32) for _ in range(2))
    B, L, width = gate.shape
    _fwd(
        gate=gate, up=up, weight=weight, bias=bias, y=out, mean=mean, rstd=rstd,
        B=B, L=L, width=width, F=channels, eps=eps, dtype=common,
    )  # fmt: skip
    return out.to(dtype), mean, rstd


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up, (B, L, WIDTH), contiguous, and of weight and bias, fp32; always the same bits."""
    dtypes, common = (gate.dtype, up.dtype), _common_dtype(gate, up)
    grad, gate, up = (_compiled.adjacent_channels(t.to(common)) for t in (grad, gate, up))
    weight, mean, rstd = _parameter(weight), mean.contiguous(), rstd.contiguous()
    (B, L, width), blocks = gate.shape, max(1, min(BLOCKS, mean.numel() // LEAST_TOKENS))
    grad_gate, grad_up = _compiled.empty(gate, *gate.shape), _compiled.empty(up, *up.shape)
    sums = weight.new_empty((blocks, 2, width))
    grad_weight, grad_bias = weight.new_empty(width), weight.new_empty(width)
    _bwd(
        grad=grad, gate=gate, up=up, weight=weight, mean=mean, rstd=rstd,
        grad_gate=grad_gate, grad_up=grad_up, sums=sums, grad_weight=grad_weight, grad_bias=grad_bias,
        B=B, L=L, width=width, F=channels, blocks=blocks, dtype=common,
    )  # fmt: skip
    return grad_gate.to(dtypes[0]), grad_up.to(dtypes[1]), grad_weight, grad_bias


def _common_dtype(gate: Tensor, up: Tensor) -> torch.dtype:
    """C++ takes one dtype for both."""
    return gate.dtype if gate.dtype == up.dtype else torch.float32


def _parameter(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()
