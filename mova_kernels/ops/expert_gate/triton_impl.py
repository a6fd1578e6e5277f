"""expert_gate in Triton: a program handles one sample, in fp64 (reference.py says why)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rankable(logits):
    """NaN counts as infinity: it beats and ties like a number, so that never more than topk are kept."""
    return tl.where(logits == logits, logits, float("inf"))


@triton.jit
def _softmax(logits, kept):
    """Over the kept logits, in fp64; 0 where not kept, also if nothing is."""
    logits = tl.where(kept, logits.to(tl.float64), float("-inf"))
    exponentials = tl.where(kept, tl.exp(logits - tl.max(logits)), 0.0)
    return tl.where(kept, exponentials / tl.sum(exponentials), 0.0)


@triton.jit
def _forward_kernel(
    logits, selected, weights, kept, stride_lb, stride_ln, stride_sb, stride_sn, topk,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK).to(tl.int64)
    inside = experts < N
    logits += sample * stride_lb
    selected += sample * stride_sb
    is_selected = tl.load(selected + experts * stride_sn, mask=inside, other=False)
    values = _load(logits + experts * stride_ln, inside)
    mine = _rankable(values)
    rank = tl.zeros((BLOCK,), tl.int32)
    for i in range(N):
        rival = tl.cast(i, tl.int64)
        other = _rankable(_load(logits + rival * stride_ln, True))
        ahead = (other > mine) | ((other == mine) & (rival < experts))
        rank += (ahead & tl.load(selected + rival * stride_sn)).to(tl.int32)
    best = is_selected & (rank < topk)
    tl.store(weights + sample * N + experts, _softmax(values, best).to(tl.float32), mask=inside)
    tl.store(kept + sample * N + experts, best, mask=inside)


@triton.jit
def _backward_kernel(
    grad, logits, kept, grad_logits, stride_gb, stride_gn, stride_lb, stride_ln, stride_kb, stride_kn,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight * (grad - sum of weight * grad). Recomputes the weights: stored fp32 weights are too coarse here."""
    sample = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK).to(tl.int64)
    inside = experts < N
    best = tl.load(kept + sample * stride_kb + experts * stride_kn, mask=inside, other=False)
    values = _load(logits + sample * stride_lb + experts * stride_ln, best)
    grads = _load(grad + sample * stride_gb + experts * stride_gn, best).to(tl.float64)
    weights = _softmax(values, best)
    slope = weights * (grads - tl.sum(weights * grads))
    slope = slope.to(tl.float32).to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + sample * N + experts, slope, mask=inside)


def forward(logits: Tensor, selected: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """(B, N), (B, N) bool -> weights (B, N) fp32, kept (B, N) bool, contiguous."""
    weights = logits.new_empty(logits.shape, dtype=torch.float32)
    kept = logits.new_empty(logits.shape, dtype=torch.bool)
    if weights.numel():
        with torch.cuda.device_of(logits):
            _forward_kernel[(logits.shape[0],)](
                logits, selected, weights, kept, *logits.stride(), *selected.stride(), topk, **_options(logits)
            )
    return weights, kept


def backward(grad: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
    """Gradient of the weights (B, N) -> gradient of the logits (B, N), contiguous."""
    grad_logits = logits.new_empty(logits.shape)
    if grad_logits.numel():
        with torch.cuda.device_of(logits):
            _backward_kernel[(logits.shape[0],)](
                grad, logits, kept, grad_logits, *grad.stride(), *logits.stride(), *kept.stride(), **_options(logits)
            )
    return grad_logits


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """What tools/compile_gate.py compiles: the official seven experts, and many."""
    for dtype, num_experts in ((torch.bfloat16, 7), (torch.float32, 7), (torch.float32, 256)):
        name = f"{str(dtype).removeprefix('torch.')} N={num_experts}"
        yield name, functools.partial(_compile_case, dtype, num_experts)


def _compile_case(dtype: torch.dtype, num_experts: int) -> None:
    logits = torch.empty(8, num_experts, dtype=dtype, device="meta")
    weights, kept = forward(logits, torch.empty(8, num_experts, dtype=torch.bool, device="meta"), 3)
    backward(weights, logits, kept)


def _options(logits: Tensor) -> dict[str, int]:
    num_experts = logits.shape[1]
    block = triton.next_power_of_2(num_experts)
    return {"N": num_experts, "BLOCK": block, "num_warps": min(max(1, block // 32), 8)}
