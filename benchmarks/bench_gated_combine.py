"""gated_combine at the official size, three pairs of one sample: cpu against the reference."""

from __future__ import annotations

import pytest
import torch

from mova_kernels import RaggedPairs, backends
from mova_kernels.ops import gated_combine

EXPERTS, TOKENS, WIDTH = 3, 2304, 1024


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_three_pairs(benchmark, dtype, direction, implementation):
    """Forward alone, or with all gradients."""
    try:
        backends.choose("gated_combine", implementation, torch.device("cpu"), dtype)
    except backends.BackendError as error:
        pytest.skip(str(error))
    benchmark.group = f"gated_combine {dtype} {direction}"
    pairs = RaggedPairs.from_routing(torch.ones(1, EXPERTS, dtype=torch.bool))
    needs = direction == "both"
    x, attended = torch.randn(1, TOKENS, WIDTH, dtype=dtype), torch.randn(EXPERTS, TOKENS, WIDTH, dtype=dtype)
    gate = torch.rand(EXPERTS)
    norms = [(torch.ones(WIDTH, dtype=dtype), torch.zeros(WIDTH, dtype=dtype)) for _ in range(EXPERTS)]
    weights = [torch.randn(WIDTH, WIDTH, dtype=dtype) / 32 for _ in range(EXPERTS)]
    biases = [torch.randn(WIDTH, dtype=dtype) for _ in range(EXPERTS)]
    leaves = [x, attended, gate, *(t for norm in norms for t in norm), *weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_(needs)
    grad = torch.randn_like(x)

    def run() -> None:
        y = gated_combine(x, attended, gate, pairs, norms, weights, biases, backend=implementation)
        if needs:
            torch.autograd.grad(y, leaves, grad)

    run()
    benchmark.pedantic(run, rounds=7)
