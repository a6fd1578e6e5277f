"""feature_norm against the official sequence of torch ops, on the experts' real grids, with one thread and with all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mova_kernels import backends
from mova_kernels.dense_reference import feature_align
from mova_kernels.ops import feature_norm

# Side and width: DINOv2, Pix2Struct, BiomedCLIP, SAM.
SHAPES = [(37, 1536), (45, 1536), (14, 768), (64, 256)]


@pytest.mark.parametrize("implementation", ["official", "cpu", "reference"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("side", "width"), SHAPES, ids=[f"{s}x{s}x{c}" for s, c in SHAPES])
def test_one_expert(benchmark, threads, side, width, dtype, direction, implementation):
    """Grid to 48 x 48 tokens, forward alone or with the gradient of the features."""
    x = torch.randn(1, side * side, width, dtype=dtype, requires_grad=direction == "both")
    weight, bias, grad = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype), None
    benchmark.group = f"feature_norm {side}x{side}x{width} -> 48x48 {dtype} {direction} {threads}"
    if implementation != "official":
        try:
            backends.choose("feature_norm", implementation, x.device, dtype)
        except backends.BackendError as error:
            pytest.skip(str(error))

    def forward():
        if implementation == "official":
            return F.layer_norm(feature_align(x, (side, side), 48), (width,), weight, bias)
        return feature_norm([x], [(side, side)], (48, 48), [None], backend=implementation)[0]

    if direction == "both":
        grad = torch.randn_like(forward())
    benchmark(forward if grad is None else lambda: torch.autograd.grad(forward(), x, grad))
