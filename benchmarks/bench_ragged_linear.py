"""ragged_linear at the official size, three pairs of one sample: cpu against the reference."""

from __future__ import annotations

import pytest
import torch

from mova_kernels import RaggedPairs, backends
from mova_kernels.ops import ragged_linear

TOKENS, WIDTH = 2304, 1024
EXPERTS = (1536, 512, 768)  # DINOv2, Vary, Deplot


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("projections", ["queries", "keys and values"])
def test_three_pairs(benchmark, projections, dtype, direction, implementation):
    """Forward alone, or with gradients: of the tokens for queries, of the parameters alone for keys and values."""
    try:
        backends.choose("ragged_linear", implementation, torch.device("cpu"), dtype)
    except backends.BackendError as error:
        pytest.skip(str(error))
    benchmark.group = f"ragged_linear {projections} {dtype} {direction}"
    queries = projections == "queries"
    pairs = RaggedPairs.from_routing(torch.ones(1, len(EXPERTS), dtype=torch.bool))
    widths = (WIDTH,) * len(EXPERTS) if queries else EXPERTS
    x = [torch.randn(1, TOKENS, width, dtype=dtype) for width in (widths[:1] if queries else widths)]
    affines = [(torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)) for width in widths]
    weights = [
        [torch.randn(WIDTH, width, dtype=dtype) / width**0.5 for width in widths] for _ in range(1 if queries else 2)
    ]
    leaves = [*(t for affine in affines for t in affine), *(w for p in weights for w in p), *(x if queries else ())]
    needs = direction == "both"
    for leaf in leaves:
        leaf.requires_grad_(needs)
    grads = [torch.randn(len(EXPERTS), TOKENS, WIDTH, dtype=dtype) for _ in weights]

    def run() -> None:
        outputs = ragged_linear(x[0] if queries else x, pairs, affines, weights, backend=implementation)
        if needs:
            torch.autograd.grad(outputs, leaves, grads)

    run()
    benchmark.pedantic(run, rounds=7)
