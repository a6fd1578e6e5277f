"""feature_resample against the official sequence of torch ops, on the experts' real grids."""

from __future__ import annotations

import pytest
import torch

from mova_kernels import backends
from mova_kernels.dense_reference import feature_align
from mova_kernels.ops import feature_resample

# Side and width: DINOv2, Pix2Struct, BiomedCLIP, SAM.
SHAPES = [(37, 1536), (45, 1536), (14, 768), (64, 256)]
THREADS = {"1-thread": 1, "all-threads": torch.get_num_threads(), "cuda": torch.get_num_threads()}


@pytest.fixture(params=["1-thread", "all-threads", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device"))])  # fmt: skip
def where(request):
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS[request.param])
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ["official", *backends.BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("side", "width"), SHAPES, ids=[f"{s}x{s}x{c}" for s, c in SHAPES])
def test_forward(benchmark, where, side, width, dtype, implementation):
    on_gpu = where == "cuda"
    x = torch.randn(8 if on_gpu else 1, side * side, width, dtype=dtype, device="cuda" if on_gpu else "cpu")
    benchmark.group = f"feature_resample {len(x)}x{side}x{side}x{width} -> 48x48 {dtype} {where}"
    if implementation != "official":
        try:
            backends.choose("feature_resample", implementation, x.device, dtype)
        except backends.BackendError as error:
            pytest.skip(str(error))

    def run():
        if implementation == "official":
            feature_align(x, (side, side), 48)
        else:
            feature_resample(x, (side, side), (48, 48), backend=implementation)
        if on_gpu:
            torch.cuda.synchronize()

    benchmark(run)
