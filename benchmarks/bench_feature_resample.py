"""feature_resample against the official sequence of torch ops, on the experts' real grids."""

from __future__ import annotations

import pytest
import torch

from mova_kernels import backends
from mova_kernels.dense_reference import feature_align
from mova_kernels.ops import feature_resample

# Side and width: DINOv2, Pix2Struct, BiomedCLIP, SAM.
SHAPES = [(37, 1536), (45, 1536), (14, 768), (64, 256)]


@pytest.fixture(params=[1, 0], ids=["1-thread", "all-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or before)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ["official", *backends.BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("side", "width"), SHAPES, ids=[f"{s}x{s}x{c}" for s, c in SHAPES])
def test_forward(benchmark, threads, side, width, dtype, implementation):
    x = torch.randn(1, side * side, width, dtype=dtype)
    benchmark.group = f"feature_resample {side}x{side}x{width} -> 48x48 {dtype} {torch.get_num_threads()} threads"
    if implementation == "official":
        benchmark(feature_align, x, (side, side), 48)
        return
    try:
        backends.choose("feature_resample", implementation, x.device, dtype)
    except backends.BackendError as error:
        pytest.skip(str(error))
    benchmark(feature_resample, x, (side, side), (48, 48), backend=implementation)
