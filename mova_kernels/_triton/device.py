"""Device functions and launch helpers that several ops share. Only files that need Triton import this module."""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

REGISTERS = 255  # per thread: without a limit ptxas spills some to fit a second block into a multiprocessor
VERSION = tuple(int(n) for n in triton.__version__.split(".")[:2])


@triton.jit
def pick(values, i):
    """values[i] of a tuple of pointers or integers, for an i that only the device knows."""
    value = values[0]
    for j in tl.static_range(1, len(values)):
        value = tl.where(i == j, values[j], value)
    return value


@triton.jit
def rotate_pairs(x, cos, sin, ADJOINT: tl.constexpr):
    """(R, D) and tables (R, D): adjacent channels (a, b) -> (a cos - b sin, b cos + a sin) in fp32, fp64 for fp64.

    cos and sin may differ within a pair. ADJOINT: the gradient of that.
    """
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    pairs: tl.constexpr = (x.shape[0], x.shape[1] // 2, 2)
    a, b = tl.split(tl.reshape(x, pairs))
    cos_a, cos_b = tl.split(tl.reshape(cos, pairs))
    sin_a, sin_b = tl.split(tl.reshape(sin, pairs))
    if ADJOINT:
        y = tl.join(a * cos_a + b * sin_b, b * cos_b - a * sin_a)
    else:
        y = tl.join(a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    return tl.reshape(y, (x.shape[0], x.shape[1]))


@triton.jit
def nan_if_infinite(factor, variance):
    """``factor`` = 1 / sqrt(variance + eps), NaN where squares overflowed: 0 would make it a token of zeros."""
    return tl.where(variance < float("inf"), factor, float("nan"))


def adjacent_channels(x: Tensor) -> Tensor:
    """``x``, or a copy whose last dimension has stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dot_precision() -> str:
    """What tl.dot does with fp32 operands: TF32 only if torch's own switch is on."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def num_multiprocessors(x: Tensor) -> int:
    """The multiprocessors of the device of ``x``; 3 where there is no GPU (interpreter, compile gate)."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def stages_with_fences(num_stages: int, kind: str) -> int:
    """The pipeline stages of a loop with products in ``kind`` (:func:`arithmetic`): 1 for Triton 3.6 from sm_90 on.

    wgmma and tcgen05 read shared memory through another proxy than threads write it, so a fence.proxy.async must lie
    between. Triton 3.6 leaves it out of pipelined loops (triton-lang/triton#9610, mended in 3.7), not with one stage.
    """
    if num_stages == 1 or kind == "ieee" or VERSION >= (3, 7) or target() < 90:
        return num_stages
    _warn_of_one_stage()
    return 1


def target() -> int:
    """The compute capability that kernels are compiled for, such as 90; 0 in Triton's interpreter."""
    if not isinstance(rotate_pairs, triton.JITFunction):
        return 0
    return triton.runtime.driver.active.get_current_target().arch


@functools.cache  # once
def _warn_of_one_stage() -> None:
    warnings.warn(
        f"Triton {triton.__version__} omits memory fences from pipelined loops from compute capability 9.0 on, so "
        "that mova_kernels launches matrix products without pipelining, which is slower; Triton 3.7 has the fences",
        stacklevel=2,
    )


def arithmetic(x: Tensor) -> str:
    """What a matrix product of tensors like ``x`` is computed in: "16-bit", "tf32" or "ieee", fp32 proper."""
    return "16-bit" if x.element_size() == 2 else dot_precision()
