"""token_downsample against the official sequence of torch ops, at the official size, with all threads."""

from __future__ import annotations

import pytest
import torch

from mova_kernels import backends
from mova_kernels.adapter import Downsample
from mova_kernels.dense_reference import _downsample
from mova_kernels.ops import token_downsample

SIDE, WIDTH = 48, 1024


@pytest.mark.parametrize("implementation", ["official", "reference", "cpu"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_sample(benchmark, dtype, direction, implementation):
    """48 x 48 tokens to 24 x 24, forward alone or with the gradients of tokens and parameters."""
    module = Downsample(WIDTH, SIDE).to(dtype).requires_grad_(direction == "both")
    named = {f"downsample.{name}": p for name, p in module.named_parameters()}
    x = torch.randn(1, SIDE * SIDE, WIDTH, dtype=dtype, requires_grad=direction == "both")
    stages, grad = (module[0].b1.weights(), module[2].b1.weights()), None
    benchmark.group = f"token_downsample {SIDE}x{SIDE}x{WIDTH} {dtype} {direction}"
    if implementation != "official":
        try:
            backends.choose("token_downsample", implementation, x.device, dtype)
        except backends.BackendError as error:
            pytest.skip(str(error))

    def forward():
        if implementation == "official":
            return _downsample(named, x, SIDE)
        return token_downsample(x, SIDE, stages, backend=implementation)

    if direction == "both":
        grad = torch.randn_like(forward())
    leaves = [x, *named.values()]
    benchmark(forward if grad is None else lambda: torch.autograd.grad(forward(), leaves, grad))
