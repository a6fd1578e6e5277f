"""Every op that has CUDA or Triton kernels, in bf16 at the official size, beside its reference in PyTorch.

Four samples with 3, 2, 1 and 0 experts, as in the demo: six pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mova_kernels import RaggedPairs, backends, ops
from mova_kernels.adapter import Downsample
from mova_kernels.demo.comparison import EXPERTS, OFFICIAL, SELECTED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
CONFIG, SIDES = OFFICIAL
ROUTING = torch.tensor([[name in chosen for name in EXPERTS] for chosen in SELECTED])
B, P, L, C = len(ROUTING), int(ROUTING.sum()), CONFIG.num_tokens, CONFIG.in_channels
GRID = (CONFIG.resolution, CONFIG.resolution)


class Problem(NamedTuple):
    """``flop`` of the forward pass, and how many times as many the backward pass has; 0: bound by memory."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]  # of the backend and the inputs
    inputs: list[Tensor]
    flop: int = 0
    backward: float = 2


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE)


def feature_resample() -> Problem:
    side, channels = SIDES[0], CONFIG.expert_channels[0]
    return Problem(
        lambda backend, x: ops.feature_resample(x, (side, side), GRID, backend=backend),
        [noise(B, side**2, channels)],
    )


def feature_norm() -> Problem:
    used = [e for e in range(CONFIG.num_experts) if ROUTING[:, e].any()]
    sizes = [(SIDES[e], SIDES[e]) for e in used]
    return Problem(
        lambda backend, *x: ops.feature_norm(x, sizes, GRID, [None] * len(x), backend=backend),
        [noise(int(ROUTING[:, e].sum()), SIDES[e] ** 2, CONFIG.expert_channels[e]) for e in used],
    )


def expert_gate() -> Problem:
    selected = ROUTING.to(DEVICE)
    return Problem(
        lambda backend, logits: ops.expert_gate(logits, selected, CONFIG.topk, backend=backend)[0],
        [noise(B, CONFIG.num_experts)],
    )


def ragged_linear() -> Problem:
    """Keys and values."""
    pairs = RaggedPairs.from_routing(ROUTING, device=DEVICE)
    rows, widths = ROUTING.sum(0).tolist(), CONFIG.expert_channels
    n = CONFIG.num_experts
    affines = [(torch.ones(c, dtype=DTYPE, device=DEVICE), noise(c)) for c in widths]
    weights = [noise(C, c) for _ in range(2) for c in widths]
    return Problem(
        lambda backend, *t: ops.ragged_linear(t[:n], pairs, affines, [t[n : 2 * n], t[2 * n :]], backend=backend),
        [*(noise(r, L, c) for r, c in zip(rows, widths, strict=True)), *weights],
        flop=2 * sum(2 * r * L * c * C for r, c in zip(rows, widths, strict=True)),
    )


def rope2d() -> Problem:
    cos, sin = (table.to(DEVICE) for table in ops.rope2d_table(CONFIG.resolution, CONFIG.head_channels))
    return Problem(
        lambda backend, x: ops.rope2d(x, cos, sin, backend=backend),
        [noise(P, L, CONFIG.num_heads, CONFIG.head_channels)],
    )


def expert_attention() -> Problem:
    """The reference is PyTorch's scaled_dot_product_attention behind the rotation."""
    cos, sin = (table.to(DEVICE) for table in ops.rope2d_table(CONFIG.resolution, CONFIG.head_channels))
    return Problem(
        lambda backend, q, k, v: ops.expert_attention(q, k, v, cos, sin, CONFIG.num_heads, backend=backend),
        [noise(P, L, C) for _ in range(3)],
        flop=4 * P * L * L * C,
        backward=2.5,
    )


def gated_combine() -> Problem:
    pairs, n = RaggedPairs.from_routing(ROUTING, device=DEVICE), CONFIG.num_experts
    norms = [(torch.ones(C, dtype=DTYPE, device=DEVICE), noise(C)) for _ in range(n)]
    biases, gate = [noise(C) for _ in range(n)], torch.rand(P, device=DEVICE)
    return Problem(
        lambda backend, x, attended, *weights: ops.gated_combine(
            x, attended, gate, pairs, norms, weights, biases, backend=backend
        ),
        [noise(B, L, C), noise(P, L, C), *(noise(C, C) for _ in range(n))],
        flop=2 * P * L * C * C,
    )


def swiglu_norm() -> Problem:
    hidden = int(C * 8 / 3)
    return Problem(
        lambda backend, *inputs: ops.swiglu_norm(*inputs, backend=backend),
        [noise(B, L, hidden), noise(B, L, hidden), noise(hidden), noise(hidden)],
    )


def token_downsample() -> Problem:
    """By count, the two 1x1 convolutions of each stage."""
    parameters = [noise(*p.shape) for p in Downsample(C, CONFIG.resolution).parameters()]

    def function(backend: str, x: Tensor, *flat: Tensor) -> Tensor:
        stages = ops.StageWeights.of(flat[:13]), ops.StageWeights.of(flat[13:])
        return ops.token_downsample(x, CONFIG.resolution, stages, backend=backend)

    return Problem(function, [noise(B, L, C), *parameters], flop=2 * 2 * B * (L + L // 4) * C * C)


PROBLEMS = (
    feature_resample, feature_norm, expert_gate, ragged_linear, rope2d, expert_attention, gated_combine, swiglu_norm,
    token_downsample,
)  # fmt: skip


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.__name__)
def test_op(benchmark, problem, direction, implementation):
    op = problem.__name__
    native = "cuda" if op == "feature_resample" else "triton"
    backend = native if implementation == "kernels" else "reference"
    try:
        backends.choose(op, backend, DEVICE, DTYPE)
    except backends.BackendError as error:
        pytest.skip(str(error))
    function, inputs, flop, factor = problem()
    inputs = [x.requires_grad_() for x in inputs]
    result = function(backend, *inputs)
    outs = [result] if isinstance(result, Tensor) else list(result)
    cotangents = [torch.randn_like(out) for out in outs]
    grads = torch.autograd.grad(outs, inputs, cotangents, retain_graph=True, allow_unused=True)

    def run() -> None:
        if direction == "forward":
            with torch.no_grad():
                function(backend, *inputs)
        else:
            torch.autograd.grad(outs, inputs, cotangents, retain_graph=True, allow_unused=True)
        torch.cuda.synchronize()

    run()
    benchmark.group = f"{op}, {direction}, {DTYPE}"
    if implementation == "kernels":
        benchmark.extra_info["kernel"] = f"{op}/{op}.cu" if backend == "cuda" else f"{op}/triton_impl.py"
        benchmark.extra_info["what"] = direction
    if flop:
        benchmark.extra_info["flop"] = flop if direction == "forward" else int(factor * flop)
    else:
        # At least; some backward passes read more than the gradients.
        moved = [*inputs, *outs] if direction == "forward" else [*cotangents, *(g for g in grads if g is not None)]
        benchmark.extra_info["bytes"] = size(*moved)
    benchmark(run)
