"""The dense fp32 product of the adapter's layers on a CPU, against F.linear: forward and both gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mova_kernels._linear import linear

# Inputs and outputs: projections, w1 and w2, w3.
SHAPES = [(1024, 1024), (1024, 2730), (2730, 1024)]


@pytest.mark.parametrize("implementation", ["torch", "linear"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES, ids=[f"{i}->{o}" for i, o in SHAPES])
def test_2304_tokens(benchmark, inputs, outputs, direction, implementation):
    needs = direction == "both"
    leaves = [torch.randn(size, requires_grad=needs) for size in ((1, 2304, inputs), (outputs, inputs), (outputs,))]
    function = F.linear if implementation == "torch" else linear
    grad = torch.randn(1, 2304, outputs)
    benchmark.group = f"linear {inputs} -> {outputs} {direction}"

    def run() -> None:
        y = function(*leaves)
        if needs:
            torch.autograd.grad(y, leaves, grad)

    run()
    benchmark.pedantic(run, rounds=5)
