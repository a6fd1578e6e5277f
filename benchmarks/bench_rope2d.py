"""rope2d against the official formula in torch, at the official size, with one thread and with all."""

from __future__ import annotations

import pytest
import torch

from mova_kernels import backends
from mova_kernels.ops import rope2d, rope2d_table

SIDE, HEADS, WIDTH = 48, 16, 64


@pytest.mark.parametrize("implementation", ["eager", "cpu", "reference"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("layout", ["contiguous", "slice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_official_size(benchmark, threads, dtype, layout, direction, implementation):
    """Queries of their own, or a slice of one projection to queries, keys and values."""
    parts = 1 if layout == "contiguous" else 3
    x = torch.randn(1, SIDE**2, parts, HEADS, WIDTH).to(dtype)[:, :, 0].requires_grad_(direction == "both")
    grad = torch.randn(x.shape).to(dtype)
    tables = rope2d_table(SIDE, WIDTH)
    cos, sin = (t[:, None].to(dtype) for t in tables)
    benchmark.group = f"rope2d {tuple(x.shape)} {layout} {dtype} {direction} {threads}"
    if implementation != "eager":
        try:
            backends.choose("rope2d", implementation, x.device, dtype)
        except backends.BackendError as error:
            pytest.skip(str(error))

    def forward():
        if implementation == "eager":
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin
        return rope2d(x, *tables, backend=implementation)

    benchmark(forward if direction == "forward" else lambda: torch.autograd.grad(forward(), x, grad))
