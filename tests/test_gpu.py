"""What only a GPU can show. Run by tools/gpu_check.sh; skipped where there is no CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from helpers import check_budget

from mova_kernels import MoVAdapter, RaggedPairs, backends, device_routing
from mova_kernels.adapter import Downsample
from mova_kernels.dense_reference import dense_adapter, feature_align
from mova_kernels.ops import (
    StageWeights,
    expert_attention,
    expert_gate,
    feature_norm,
    feature_resample,
    gated_combine,
    ragged_linear,
    rope2d,
    rope2d_table,
    swiglu_norm,
    token_downsample,
)
from testing.golden import Golden

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Up- and downsampling of the official experts; channels that fill 16-byte vectors, and some that do not.
CASES = [(37, 48, 256), (64, 48, 256), (14, 48, 768), (5, 7, 33)]


def skip_without(op: str, dtype: torch.dtype) -> None:
    """Skip where the op has no CUDA kernel for this device."""
    try:
        backends.choose(op, "cuda", torch.device("cuda"), dtype)
    except backends.BackendError as error:
        pytest.skip(str(error))


@pytest.fixture
def cuda_kernel() -> None:
    skip_without("feature_resample", torch.float32)


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


def check_attention(backend: str, side: int, width: int, dtype: torch.dtype, runs: int = 2) -> None:
    """Against fp64, and with the same bits in every run."""
    cos, sin = (table.cuda() for table in rope2d_table(side, width))
    leaves = [torch.randn(2, side * side, 2 * width, dtype=dtype, device="cuda") for _ in range(4)]
    *qkv, cotangent = leaves

    def by(backend: str, working: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (t.to(working).requires_grad_() for t in qkv)
        out = expert_attention(q, k, v, cos, sin, 2, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent.to(working))]

    actual, *again = (by(backend, dtype) for _ in range(runs))
    truth, plain = by("reference", torch.float64), by("reference", dtype)
    for i, (name, a, t, p) in enumerate(zip(("out", "q", "k", "v"), actual, truth, plain, strict=True)):
        check_budget(name, a, t, p)
        assert all(torch.equal(a, other[i]) for other in again), f"{name} differs from run to run"


# The official tokens and head width, which fill every tile; a cut tile; the other head widths.
@pytest.mark.parametrize(("side", "width"), [(48, 64), (10, 64), (16, 32), (16, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_attention_in_triton_and_its_gradients(side, width, dtype):
    check_attention("triton", side, width, dtype)


@pytest.mark.parametrize(("side", "width"), [(48, 64), (10, 64), (1, 64), (48, 128), (17, 128)])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_expert_attention_in_cuda_and_its_gradients(side, width, dtype):
    skip_without("expert_attention", dtype)
    check_attention("cuda", side, width, dtype, runs=20)


def test_expert_attention_in_cuda_is_captured_in_a_graph():
    skip_without("expert_attention", torch.bfloat16)
    cos, sin = (table.cuda() for table in rope2d_table(20, 64))
    q, k, v = (torch.randn(2, 400, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    q[1] *= 100  # some tiles are computed again, and some queries in fp64
    num_valid = torch.tensor([2], device="cuda")
    call = lambda: expert_attention(q, k, v, cos, sin, 2, num_valid=num_valid, backend="cuda")  # noqa: E731
    expected, (graph, out) = call(), captured(call)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    num_valid.fill_(1)
    graph.replay()
    assert torch.equal(out[0], expected[0]) and not out[1].any()


def test_expert_attention_in_triton_with_scores_beyond_fp32():
    cos, sin = (table.cuda() for table in rope2d_table(10, 64))
    q, k, v, cotangent = (torch.randn(2, 100, 128, device="cuda") for _ in range(4))
    q[0, 67, :64] *= 1e9
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = expert_attention(*leaves, cos, sin, 2, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(dtype))])
    for found, true in zip(*results, strict=True):
        torch.testing.assert_close(found, true.float(), rtol=1e-4, atol=1e-4)


# Official widths and grids, with an idle expert, a negative row and slices of wider features; odd ones without rows.
@pytest.mark.parametrize("official", [True, False], ids=["official", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feature_norm_in_triton_and_its_gradients(official, dtype):
    sides = (37, 64, 64, 48, 14) if official else (5, 9)
    channels = (1536, 512, 256, 1536, 768) if official else (33, 7)
    out = 48 if official else 7
    chosen = [[2, 0], [1, -1], [2], [0, 1, 2], []] if official else [[0, 1, 2]] * 2
    rows = [torch.tensor(c, dtype=torch.int64, device="cuda") if official else None for c in chosen]
    valid_rows = [[i for i, sample in enumerate(c) if sample >= 0] for c in chosen]
    wide = [torch.randn(3, s * s, c + 16, dtype=dtype, device="cuda") for s, c in zip(sides, channels, strict=True)]
    cotangents: list[torch.Tensor] = []

    def by(backend: str, working: torch.dtype) -> list[torch.Tensor]:
        x = [t.to(working)[..., 16:].requires_grad_() for t in wide]
        y = feature_norm(x, [(s, s) for s in sides], (out, out), rows, backend=backend)
        valid = [t[r] for t, r in zip(y, valid_rows, strict=True)]
        cotangents.extend(torch.randn_like(t) for t in valid[len(cotangents) :])
        gradients = torch.autograd.grad(valid, x, [c.to(working) for c in cotangents])
        return [*(t.detach() for t in valid), *gradients]

    actual, again = by("triton", dtype), by("triton", dtype)
    truth, plain = by("reference", torch.float64), by("reference", dtype)
    for i, (a, b, t, p) in enumerate(zip(actual, again, truth, plain, strict=True)):
        check_budget(f"{'gradient' if i >= len(sides) else 'value'} {i % len(sides)}", a, t, p)
        assert torch.equal(a, b), "differs from run to run"


def check_triton(function, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Value and gradients of function(backend, *inputs) against the reference, and the same bits twice."""
    inputs = [t.to("cuda", dtype) for t in inputs]

    def by(backend: str, working: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(working).requires_grad_() for t in inputs]
        out = function(backend, *leaves)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]

    actual, again = by("triton", dtype), by("triton", dtype)
    truth, plain = by("reference", torch.float64), by("reference", dtype)
    for i, (a, b, t, p) in enumerate(zip(actual, again, truth, plain, strict=True)):
        name = f"gradient of input {i - 1}" if i else "value"
        # Of the few entries of a bias it is luck how large the largest error is.
        check_budget(name, a, t, p, (2, torch.inf) if a.numel() > 4096 else (2,))
        assert torch.equal(a, b), f"{name} differs from run to run"


# The official width; one that fills its block; as halves of one padded projection.
@pytest.mark.parametrize(("width", "stride"), [(2730, 2730), (256, 256), (2730, 2752)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_norm_in_triton_and_its_gradients(width, stride, dtype):
    def function(backend: str, wide, weight, bias) -> torch.Tensor:
        return swiglu_norm(wide[..., :width], wide[..., stride : stride + width], weight, bias, backend=backend)

    check_triton(function, [torch.randn(2, 300, 2 * stride), 1 + torch.randn(width) / 4, torch.randn(width)], dtype)


@pytest.mark.parametrize("num_experts", [7, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expert_gate_in_triton_and_its_gradient(num_experts, dtype):
    selected = (torch.rand(100, num_experts) < 0.6).cuda()
    # No two logits of a row are equal, also in bf16, which would leave the choice open.
    logits = torch.rand(100, num_experts).argsort(1) * 8 / num_experts - 4
    check_triton(lambda backend, logits: expert_gate(logits, selected, 3, backend=backend)[0], [logits], dtype)


# The official tokens and heads; a cut tile and group of heads; a width that fills no block.
@pytest.mark.parametrize(("side", "heads", "width"), [(48, 16, 64), (5, 3, 64), (5, 3, 12)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope2d_in_triton_and_its_gradient(side, heads, width, dtype):
    cos, sin = (table.cuda() for table in rope2d_table(side, width))
    x = torch.randn(2, side * side, heads, width)
    check_triton(lambda backend, x: rope2d(x, cos, sin, backend=backend), [x], dtype)


# Two samples share an expert, so that gradients are sums; one sample has none.
SELECTED = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()


# The official widths of keys and values, and of queries; tiles that are cut.
@pytest.mark.parametrize(
    ("shared", "tokens", "widths", "outputs"),
    [(False, 256, (1536, 512, 256), 1024), (True, 256, (1024,) * 3, 1024), (False, 70, (72, 40, 130), 66)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_linear_in_triton_and_its_gradients(shared, tokens, widths, outputs, dtype):
    pairs = RaggedPairs.from_routing(SELECTED, device=torch.device("cuda"))
    rows = [3] if shared else SELECTED.sum(0).tolist()
    x = [torch.randn(r, tokens, c) for r, c in zip(rows, widths, strict=False)]
    affines = [torch.randn(c) for c in widths for _ in range(2)]
    weights = [torch.randn(outputs, c) / c**0.5 for _ in range(2) for c in widths]

    def function(backend: str, *leaves: torch.Tensor) -> torch.Tensor:
        x, affines, weights = leaves[: len(rows)], leaves[len(rows) : -6], leaves[-6:]
        projections = ragged_linear(
            x[0] if shared else x,
            pairs,
            list(zip(affines[::2], affines[1::2], strict=True)),
            [weights[:3], weights[3:]],
            backend=backend,
        )
        return torch.cat(projections, -1)

    check_triton(function, [*x, *affines, *weights], dtype)


# The official width; tiles that are cut.
@pytest.mark.parametrize(("tokens", "width"), [(256, 1024), (70, 66)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_combine_in_triton_and_its_gradients(tokens, width, dtype):
    pairs = RaggedPairs.from_routing(SELECTED, device=torch.device("cuda"))
    inputs = [torch.randn(3, tokens, width), torch.randn(pairs.num_pairs, tokens, width), torch.rand(pairs.num_pairs)]
    parameters = [torch.randn(width) for _ in range(9)] + [torch.randn(width, width) / width**0.5 for _ in range(3)]

    def function(backend: str, x, attended, gate, *leaves: torch.Tensor) -> torch.Tensor:
        norms = list(zip(leaves[:3], leaves[3:6], strict=True))
        return gated_combine(x, attended, gate, pairs, norms, leaves[9:], leaves[6:9], backend=backend)

    check_triton(function, [*inputs, *parameters], dtype)


# The official grid and width; an odd side, whose pooling windows overlap, and a width that fills no block.
@pytest.mark.parametrize(("side", "width"), [(48, 1024), (5, 72)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_downsample_in_triton_and_its_gradients(side, width, dtype):
    shapes = [t.shape for t in Downsample(width, side).parameters()]
    parameters = [torch.randn(shape) / max(1, shape[1:].numel()) ** 0.5 for shape in shapes]

    def function(backend: str, x, *flat: torch.Tensor) -> torch.Tensor:
        stages = StageWeights.of(flat[:13]), StageWeights.of(flat[13:])
        return token_downsample(x, side, stages, backend=backend)

    check_triton(function, [torch.randn(2, side * side, width), *parameters], dtype)


CONFIG = replace(tiny.CONFIG, in_channels=64)  # heads of width 32, which the kernels of expert_attention take


def on_gpu(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    base, experts, text = tiny.inputs(CONFIG, dtype=dtype)
    return base.cuda(), [f.cuda() for f in experts], text.cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adapter_is_as_near_the_truth_as_the_official_computation(dtype, device):
    base, experts, text = on_gpu(dtype)
    output = tiny.adapter(CONFIG, dtype).cuda()(base, experts, tiny.ROUTING.to(device), text, grids=tiny.GRIDS)
    official = {name: p.to("cuda", dtype) for name, p in tiny.parameters(CONFIG).items()}
    dense = dense_adapter(official, CONFIG, base, experts, tiny.ROUTING.cuda(), text, grids=tiny.GRIDS)
    expected = tiny.truth(base.cpu(), [f.cpu() for f in experts], tiny.ROUTING, text.cpu(), CONFIG)
    check_budget("output", output.detach().cpu(), expected, dense.cpu())


@torch.no_grad()
def test_adapter_gives_the_official_numbers():
    """At the official size, in fp32."""
    golden = Golden("official_dims")
    adapter = MoVAdapter(golden.config)
    adapter.load_state_dict(golden.parameters())
    base, experts, routing, text = golden.inputs()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        output = adapter.cuda()(base.cuda(), [f.cuda() for f in experts], routing, text.cuda(), grids=golden.grids)
    golden.check("output", output)


def test_adapter_needs_no_synchronisation_for_a_routing_on_the_host():
    adapter = tiny.adapter(CONFIG).cuda()
    base, experts, text = on_gpu()
    adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Padding behind the pairs; more experts than topk, which each block drops by itself; no pair at all.
ROUTINGS = [tiny.ROUTING, torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)]


def captured(step: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of step() and its result, warmed up on a side stream, as PyTorch's documentation asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), device_routing():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_adapter_in_a_graph_serves_every_routing(dtype):
    """Each as near the truth as without a graph."""
    adapter, routing = tiny.adapter(CONFIG, dtype).cuda(), tiny.ROUTING.cuda()
    base, experts, text = on_gpu(dtype)

    def forward(selected: torch.Tensor = routing) -> torch.Tensor:
        return adapter(base, experts, selected, text, grids=tiny.GRIDS)

    graph, output = captured(forward)
    for selected in ROUTINGS:
        routing.copy_(selected)
        graph.replay()
        truth = tiny.truth(base.cpu(), [f.cpu() for f in experts], selected, text.cpu(), CONFIG)
        check_budget("output", output.cpu(), truth, forward(selected).cpu())


def test_adapter_training_step_in_a_graph_serves_every_routing():
    """The parameters after a step with each routing are those without a graph."""
    adapter, twin = tiny.adapter(CONFIG).cuda(), tiny.adapter(CONFIG).cuda()
    before = [p.detach().clone() for p in twin.parameters()]
    base, experts, text = on_gpu()
    routing = tiny.ROUTING.cuda()

    def training(module: MoVAdapter) -> Callable[..., torch.Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

        def step(selected: torch.Tensor = routing) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = module(base, experts, selected, text, grids=tiny.GRIDS).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    graph, loss = captured(training(adapter))
    with torch.no_grad():
        for parameter, value in zip(adapter.parameters(), before, strict=True):
            parameter.copy_(value)  # the warm-up trained them
    eager = training(twin)
    for selected in ROUTINGS:
        routing.copy_(selected)
        graph.replay()
        torch.testing.assert_close(loss, eager(selected), rtol=1e-4, atol=0)
    trained = zip(twin.named_parameters(), adapter.parameters(), before, strict=True)
    for (name, expected), actual, value in trained:
        change = expected.detach() - value
        assert change.any(), f"{name} was not trained"
        atol = 1e-3 * float(change.abs().max()) + 4 * torch.finfo(value.dtype).eps * float(value.abs().max())
        torch.testing.assert_close(actual.detach() - value, change, rtol=0, atol=atol)


def test_adapter_in_the_whole_model_as_on_the_host():
    """The whole model in fp32: images, questions and routing arrive from the host, the experts follow the model."""
    pytest.importorskip("transformers")
    from mova.demo import small_model
    from mova.demo.pictures import pictures

    host, device = small_model(), small_model()
    device.model.to("cuda")
    shown = pictures()
    arguments = [p.image for p in shown], [p.question for p in shown], [p.experts for p in shown]
    expected, found = host.fuse(*arguments), device.fuse(*arguments)
    assert found.tokens.is_cuda
    torch.testing.assert_close(found.tokens.cpu(), expected.tokens, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.gates.cpu(), expected.gates, rtol=0, atol=1e-3)
    assert len(device.answer(*arguments[:2], experts=arguments[2], max_new_tokens=4)) == 5
