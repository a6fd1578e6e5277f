"""What only a GPU can show. Run by tools/gpu_check.sh; skipped where there is no CUDA device."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from helpers import assert_within_budget, check_budget, value_and_gradients

from mova_kernels import backends
from mova_kernels.dense_reference import dense_adapter, feature_align
from mova_kernels.ops import StageWeights, expert_attention, feature_resample, rope2d_table, token_downsample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Up- and downsampling of the official experts; channels that fill 16-byte vectors, and some that do not.
CASES = [(37, 48, 256), (64, 48, 256), (14, 48, 768), (5, 7, 33)]


@pytest.fixture
def cuda_kernel() -> None:
    try:
        backends.choose("feature_resample", "cuda", torch.device("cuda"), torch.float32)
    except backends.BackendError as error:
        pytest.skip(str(error))


def resample(x: torch.Tensor, side: int, out: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    return feature_resample(x, (side, side), (out, out), rows, backend="cuda")


@pytest.mark.usefixtures("cuda_kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "out", "channels"), CASES)
def test_feature_resample_and_its_gradient(side, out, channels, dtype):
    x = torch.randn(3, side * side, channels, dtype=dtype, device="cuda", requires_grad=True)
    y = resample(x, side, out)
    cotangent = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, cotangent)

    def by_torch(working: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().to(working).requires_grad_()
        result = feature_align(leaf, (side, side), out)
        return result.detach(), torch.autograd.grad(result, leaf, cotangent.to(working))[0]

    truth, plain = by_torch(torch.float64), by_torch(dtype)
    check_budget("value", y.detach(), truth[0], plain[0])
    check_budget("gradient", gradient, truth[1], plain[1])


@pytest.mark.usefixtures("cuda_kernel")
def test_feature_resample_of_rows_of_a_slice():
    wide = torch.full((4, 36, 100), torch.nan, device="cuda")
    x = wide[..., 10:74]
    x.normal_()
    rows = torch.tensor([3, -1, 0, 3], device="cuda")
    y = resample(x, 6, 9, rows)
    assert not y[1].any()
    expected = feature_align(x[[3, 0, 3]].double(), (6, 6), 9)
    torch.testing.assert_close(y[[0, 2, 3]].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cuda_kernel")
def test_feature_resample_follows_the_current_stream():
    x = torch.zeros(8, 64 * 64, 512, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read x before it is filled
        x.fill_(1)
        y = resample(x, 64, 48)
    torch.cuda.synchronize()
    assert y.eq(1).all()


@pytest.mark.usefixtures("cuda_kernel")
def test_feature_resample_is_captured_in_a_graph():
    x = torch.randn(2, 36, 64, device="cuda")
    expected = resample(x, 6, 9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = resample(x, 6, 9)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.usefixtures("cuda_kernel")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device only")
def test_feature_resample_runs_on_the_tensors_device():
    x = torch.randn(2, 36, 64, device="cuda:1")
    with torch.cuda.device(0):
        y = resample(x, 6, 9)
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y, feature_align(x, (6, 6), 9))


# The official tokens and head width, which fill every tile; a cut tile; the other head widths.
@pytest.mark.parametrize(("side", "width"), [(48, 64), (10, 64), (16, 32), (16, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_attention_in_triton_and_its_gradients(side, width, dtype):
    cos, sin = (table.cuda() for table in rope2d_table(side, width))
    leaves = [torch.randn(2, side * side, 2 * width, dtype=dtype, device="cuda") for _ in range(4)]
    *qkv, cotangent = leaves

    def by(backend: str, working: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (t.to(working).requires_grad_() for t in qkv)
        out = expert_attention(q, k, v, cos, sin, 2, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent.to(working))]

    actual, again = by("triton", dtype), by("triton", dtype)
    truth, plain = by("reference", torch.float64), by("reference", dtype)
    for name, a, b, t, p in zip(("out", "q", "k", "v"), actual, again, truth, plain, strict=True):
        check_budget(name, a, t, p)
        assert torch.equal(a, b), f"{name} differs from run to run"


# The official grid and channels; overlapping windows, cut tiles and channels that fill no block.
@pytest.mark.parametrize(("side", "channels"), [(48, 1024), (7, 100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_downsample_in_triton_and_its_gradients(side, channels, dtype):
    squeezed = channels // 4
    square, vector = (channels, channels, 1, 1), (channels,)
    shapes = [square, vector, vector, (channels, 1, 3, 3), vector, vector, (squeezed, channels, 1, 1), (squeezed,)]
    shapes += [(channels, squeezed, 1, 1), vector, square, vector, vector]

    def draw() -> list[torch.Tensor]:
        return [torch.randn(2, side**2, channels), *(torch.randn(s) / math.prod(s[1:]) ** 0.5 for s in 2 * shapes)]

    def by(backend: str):
        def function(*inputs: torch.Tensor) -> torch.Tensor:
            x, *flat = (t.cuda() for t in inputs)
            stages = StageWeights.of(flat[:13]), StageWeights.of(flat[13:])
            return token_downsample(x, side, stages, backend=backend).cpu()

        return function

    assert_within_budget(by("reference"), by("triton"), by("reference"), draw, dtype, draws=3)
    inputs = [t.to(dtype) for t in draw()]
    first, second = (value_and_gradients(by("triton"), inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_adapter_is_as_near_the_truth_as_the_official_computation(dtype, device):
    base, experts, text = tiny.inputs(dtype=dtype)
    expected = tiny.truth(base, experts, tiny.ROUTING, text)
    base, experts, text = base.cuda(), [f.cuda() for f in experts], text.cuda()
    output = tiny.adapter(dtype=dtype).cuda()(base, experts, tiny.ROUTING.to(device), text, grids=tiny.GRIDS)
    official = {name: p.to("cuda", dtype) for name, p in tiny.parameters().items()}
    dense = dense_adapter(official, tiny.CONFIG, base, experts, tiny.ROUTING.cuda(), text, grids=tiny.GRIDS)
    check_budget("output", output.detach().cpu(), expected, dense.cpu())


def test_a_routing_on_the_host_costs_no_synchronisation():
    adapter = tiny.adapter().cuda()
    base, experts, text = tiny.inputs()
    base, text, experts = base.cuda(), text.cuda(), [f.cuda() for f in experts]
    adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
