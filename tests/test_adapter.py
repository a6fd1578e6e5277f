"""MoVAdapter against the official numbers and against the official computation in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from mova_kernels import MoVAdapter, MoVAdapterConfig, _compiled, split_concatenated, use_backend
from mova_kernels.ops.feature_norm.op import resampling_may_wait
from testing.golden import Golden, parameter_shapes


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude of ``expected``."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ["small", "over_topk", pytest.param("official_dims", marks=pytest.mark.all_threads)])
def test_outputs_of_the_official_implementation(name):
    golden = Golden(name)
    adapter = MoVAdapter(golden.config)
    adapter.load_state_dict(golden.parameters(), strict=True)
    blocks, logits = [], []
    for block in adapter.blocks:
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
        block.gate.register_forward_hook(lambda module, args, output: logits.append(output))
    with torch.no_grad():
        base, experts, routing, text = golden.inputs()
        output = adapter(base, experts, routing, text, grids=golden.grids)
    golden.check("output", output)
    golden.check("block_outputs", torch.stack(blocks))
    # Samples without experts have no gate here; the official code computes one and ignores it.
    logits = torch.stack(logits)
    expected = torch.from_numpy(golden.arrays["gate_logits"])
    golden.check("gate_logits", torch.where(routing.any(1)[:, None], logits, expected))


@pytest.mark.parametrize("name", ["small", "over_topk"])
def test_resampled_features_of_the_official_implementation(name):
    from mova_kernels.ops import feature_resample

    golden = Golden(name)
    size = (golden.config.resolution,) * 2
    for e, expert in enumerate(golden.inputs().experts):
        golden.check(f"aligned.{e}", feature_resample(expert, golden.grids[e], size))


@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("name", ["small", "over_topk"])
def test_gradients_of_the_official_implementation(name, layout):
    golden = Golden(name)
    adapter = MoVAdapter(golden.config)
    adapter.load_state_dict(golden.parameters())
    base, experts, routing, text = golden.inputs()
    leaves = [t.requires_grad_() for t in (base, *experts, text)]
    given = tiny.packed(experts, routing) if layout == "packed" else experts
    adapter(base, given, routing, text, grids=golden.grids).backward(golden.cotangent())
    golden.check_gradients({name: p.grad for name, p in adapter.named_parameters()})
    for name, leaf in zip(["base", *(f"expert.{e}" for e in range(len(experts))), "text"], leaves, strict=True):
        golden.check(f"grad.{name}", leaf.grad)


def test_names_and_shapes_are_the_official_ones():
    for config in (MoVAdapterConfig(), tiny.CONFIG):
        with torch.device("meta"):
            state = MoVAdapter(config).state_dict()
        assert {name: tuple(p.shape) for name, p in state.items()} == parameter_shapes(config)


def test_gradcheck_of_the_whole_adapter():
    config = tiny.square_config(2, in_channels=8, out_channels=3, num_layers=1, topk=1, resolution=2, text_channels=2)
    adapter = tiny.adapter(config, torch.float64)
    base, experts, text = tiny.inputs(config, 3, ((1, 1), (3, 3)), torch.float64)
    routing = torch.tensor([[1, 1], [0, 0], [0, 1]])
    leaves = [t.requires_grad_() for t in (base, *experts, text)]

    def run(base, first, second, text):
        return adapter(base, [first, second], routing, text)

    assert torch.autograd.gradcheck(run, leaves)


def test_packed_features_give_the_dense_result():
    adapter = tiny.adapter()
    base, experts, text = tiny.inputs()
    dense = adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    packed = adapter(base, tiny.packed(experts, tiny.ROUTING), tiny.ROUTING, text, grids=tiny.GRIDS)
    assert torch.equal(dense, packed)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_routing_of_any_dtype(dtype):
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    expected = adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    assert torch.equal(adapter(base, experts, tiny.ROUTING.to(dtype), text, grids=tiny.GRIDS), expected)


def test_slices_of_the_official_tensor_are_taken_without_a_copy():
    adapter = tiny.adapter()
    aligned = ((6, 6),) * 3
    base, experts, text = tiny.inputs(grids=aligned)
    concatenated = torch.cat([base, *experts], 2)
    split_base, split_experts = split_concatenated(concatenated, tiny.CONFIG)
    assert {t.untyped_storage().data_ptr() for t in (split_base, *split_experts)} == {
        concatenated.untyped_storage().data_ptr()
    }
    expected = adapter(base, experts, tiny.ROUTING, text)
    assert error(adapter(split_base, split_experts, tiny.ROUTING, text), expected) < 1e-6


@pytest.mark.parametrize("stride", ["transposed", "every other channel", "offset"])
def test_strided_inputs(stride):
    def strided(t):
        if stride == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan)
        part = wide[..., 1::2] if stride == "every other channel" else wide[..., 1 : 1 + t.shape[-1]]
        part.copy_(t)
        return part

    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    expected = adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    actual = adapter(strided(base), [strided(f) for f in experts], tiny.ROUTING, text, grids=tiny.GRIDS)
    assert error(actual, expected.double()) < 1e-6


def test_an_empty_batch():
    adapter = tiny.adapter()
    base, experts, text = tiny.inputs(num_samples=0)
    output = adapter(base, experts, torch.zeros(0, 3), text, grids=tiny.GRIDS)
    assert output.shape == (0, 9, 24)
    output.sum().backward()


# 1: no choice at all; 2: the least; 7: the official pool; 64: the most that is supported.
@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
def test_one_to_64_experts(num_experts):
    config = tiny.square_config(num_experts, num_layers=1, topk=3)
    grids = ((5, 5),) * num_experts
    base, experts, text = tiny.inputs(config, 3, grids)
    routing = torch.rand(3, num_experts, generator=torch.Generator().manual_seed(num_experts)) < 0.5
    actual = tiny.adapter(config)(base, tiny.packed(experts, routing), routing, text)
    assert error(actual, tiny.truth(base, experts, routing, text, config, grids)) < 2e-5


def test_bf16_is_at_most_twice_as_far_from_the_truth_as_the_official_computation():
    from mova_kernels.dense_reference import dense_adapter

    base, experts, text = tiny.inputs(dtype=torch.bfloat16)
    expected = tiny.truth(base, experts, tiny.ROUTING, text)
    actual = tiny.adapter(dtype=torch.bfloat16)(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    official = {name: p.bfloat16() for name, p in tiny.parameters().items()}
    dense = dense_adapter(official, tiny.CONFIG, base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    assert actual.dtype == torch.bfloat16
    assert error(actual, expected) <= 2 * error(dense, expected)


def test_autocast_runs_in_its_dtype_and_trains_fp32_parameters():
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    expected = tiny.truth(base, experts, tiny.ROUTING, text)
    mixed = [experts[0].bfloat16(), *experts[1:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapter(base, mixed, tiny.ROUTING, text.half(), grids=tiny.GRIDS)
    plain = tiny.adapter(dtype=torch.bfloat16)(
        base.bfloat16(), [f.bfloat16() for f in experts], tiny.ROUTING, text.bfloat16(), grids=tiny.GRIDS
    )
    assert output.dtype == torch.bfloat16
    assert error(output, expected) <= 2 * error(plain, expected)
    output.float().sum().backward()
    gradients = [p.grad for p in adapter.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_missing_expert_does_not_change_the_others_under_autocast():
    """Base and features in different dtypes: None counts as no rows in the dtype of the features."""
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    routing = torch.zeros_like(tiny.ROUTING)
    routing[:, 0] = True
    narrow = [f.bfloat16() for f in experts]
    outputs = []
    for others in ([None] * (len(experts) - 1), [f[:0] for f in narrow[1:]]):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad(), use_backend("reference"):
            outputs.append(adapter(base, [narrow[0], *others], routing, text, grids=tiny.GRIDS))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen experts", "trained experts"])
def test_wide_experts_of_coarse_grids(trained):
    """On a CPU, features without gradient are projected before they are resampled."""
    config = replace(tiny.CONFIG, expert_channels=(200, 8, 120))
    grids = ((2, 3), (6, 6), (3, 3))
    assert resampling_may_wait(torch.zeros(1, 6, 200), (2, 3), (6, 6)) or _compiled.cpu_reason() is not None
    base, experts, text = tiny.inputs(config, grids=grids)
    adapter = tiny.adapter(config)
    leaves = [f.requires_grad_(trained) for f in experts]
    found = adapter(base, leaves, tiny.ROUTING, text, grids=grids)
    expected = tiny.truth(base, experts, tiny.ROUTING, text, config, grids)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

    cotangent = torch.randn_like(found)
    weight = adapter.blocks[1].cross_attn[0].k_proj.weight
    (grad,) = torch.autograd.grad(found, weight, cotangent, retain_graph=True)
    with use_backend("feature_norm=reference,ragged_linear=reference"):
        rival = adapter(base, leaves, tiny.ROUTING, text, grids=grids)
    (expected,) = torch.autograd.grad(rival, weight, cotangent)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
