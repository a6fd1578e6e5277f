"""swiglu_norm against the official sequence of torch ops, at the official size, with one thread and with all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mova_kernels import backends
from mova_kernels.ops import swiglu_norm

SHAPE = (1, 2304, 2730)


@pytest.mark.parametrize("implementation", ["eager", "cpu", "reference"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_official_size(benchmark, threads, dtype, direction, implementation):
    """Forward alone, or with the gradients of both projections and of weight and bias."""
    gate, up, grad = (torch.randn(SHAPE).to(dtype) for _ in range(3))
    weight, bias = torch.ones(SHAPE[2], dtype=dtype), torch.zeros(SHAPE[2], dtype=dtype)
    benchmark.group = f"swiglu_norm {SHAPE} {dtype} {direction} {threads}"
    inputs = [t.requires_grad_(direction == "both") for t in (gate, up, weight, bias)]
    if implementation != "eager":
        try:
            backends.choose("swiglu_norm", implementation, gate.device, dtype)
        except backends.BackendError as error:
            pytest.skip(str(error))

    def forward():
        if implementation == "eager":
            return F.layer_norm(F.silu(gate) * up, weight.shape, weight, bias)
        return swiglu_norm(gate, up, weight, bias, backend=implementation)

    benchmark(forward if direction == "forward" else lambda: torch.autograd.grad(forward(), inputs, grad))
