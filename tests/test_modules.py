"""MoVAdapter as an ordinary module: copies, files, hooks, LoRA, parametrisations."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import tiny
import torch
from torch import nn

from mova_kernels import MoVAdapter, MoVAdapterConfig


def run(adapter, routing=tiny.ROUTING):
    base, experts, text = tiny.inputs()
    return adapter(base, experts, routing, text, grids=tiny.GRIDS)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deep_copy_and_pickle(duplicate):
    adapter = tiny.adapter()
    twin = duplicate(adapter)
    assert torch.equal(run(twin), run(adapter))
    twin.blocks[0].norm3.weight.data.zero_()
    assert adapter.blocks[0].norm3.weight.any()


def test_save_pretrained_and_from_pretrained(tmp_path):
    adapter = tiny.adapter()
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = MoVAdapter.from_pretrained(tmp_path)
    assert loaded.config == tiny.CONFIG
    assert torch.equal(run(loaded), run(adapter))


def test_from_pretrained_refuses_an_incomplete_file(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.adapter().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["blocks.1.norm4.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"Missing.*blocks\.1\.norm4\.bias"):
        MoVAdapter.from_pretrained(tmp_path)


def test_the_official_state_can_be_written_as_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    save_file(tiny.adapter().official_state_dict(), tmp_path / "official.safetensors")
    other = MoVAdapter(tiny.CONFIG)
    other.load_state_dict(load_file(tmp_path / "official.safetensors"))
    assert torch.equal(run(other), run(tiny.adapter()))


def test_meta_device_and_to_empty():
    with torch.device("meta"):
        adapter = MoVAdapter(tiny.CONFIG)
    adapter.to_empty(device="cpu").load_state_dict(tiny.parameters())
    assert torch.equal(run(adapter), run(tiny.adapter()))


def test_the_shape_of_a_result_on_the_meta_device():
    base, experts, text = (torch.utils._pytree.tree_map(lambda t: t.to("meta"), x) for x in tiny.inputs())
    adapter = tiny.adapter().to("meta")
    found = adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    assert found.is_meta and found.shape == (4, 9, 24)
    with pytest.raises(ValueError, match="routing must hold data, got 'a tensor on the meta device'"):
        adapter(base, experts, tiny.ROUTING.to("meta"), text, grids=tiny.GRIDS)


# A leaf, a container, a norm: whatever has a hook is called, and the result stays the same.
@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.cross_attn.1.k_proj",
        "blocks.0.cross_attn.1",
        "blocks.1.norm2.1",
        "downsample.0.b1.se",
        "blocks.0.mlp.ffn_ln",
    ],
)
def test_a_hooked_module_is_called(name):
    adapter, called = tiny.adapter(), []
    adapter.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    torch.testing.assert_close(run(adapter), run(tiny.adapter()), rtol=1e-5, atol=1e-5)
    assert called


def test_a_changed_eps_is_used():
    adapter = tiny.adapter()
    before = run(adapter)
    adapter.blocks[0].norm2[1].eps = 10.0
    assert (run(adapter) - before).abs().max() > 1e-3


def test_the_module_path_has_the_same_gradients():
    plain, hooked = tiny.adapter(), tiny.adapter()
    for block in hooked.blocks:
        block.cross_attn[0].proj.register_forward_hook(lambda *_: None)
    for adapter in (plain, hooked):
        run(adapter).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()), msg=name)


def test_a_parametrised_weight_is_used():
    adapter = tiny.adapter()
    proj = adapter.blocks[0].cross_attn[1].proj
    before = run(adapter)
    nn.utils.parametrizations.weight_norm(proj)
    torch.testing.assert_close(run(adapter), before, rtol=1e-5, atol=1e-5)
    proj.parametrizations.weight.original0.data.mul_(2)
    assert (run(adapter) - before).abs().max() > 1e-3


@pytest.mark.parametrize("wrapped", ["adapter", "every expert"])
def test_fsdp2_shards_an_adapter(wrapped):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    plain, sharded = tiny.adapter(), tiny.adapter()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        if wrapped == "every expert":  # their parameters are gathered only while they are called themselves
            for attention in sharded.blocks[0].cross_attn:
                fully_shard(attention, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for adapter in (plain, sharded):
            run(adapter).square().sum().backward()
        gradients = [p.grad.full_tensor() for p in sharded.parameters()]
    finally:
        distributed.destroy_process_group()
    for (name, p), gradient in zip(plain.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()), msg=name)


@pytest.mark.parametrize(
    "target", ["q_proj", "v_proj", "cross_attn.1.proj", "w1", "gate.0", "downsample.0.b1.conv1.conv"]
)
def test_lora_changes_the_output_and_is_trained(target):
    peft = pytest.importorskip("peft")
    expected = run(tiny.adapter())
    names = [n for n, m in tiny.adapter().named_modules() if n.endswith(target)]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    adapter = peft.get_peft_model(tiny.adapter(), config)
    output = run(adapter)
    assert (output - expected).abs().max() > 1e-3
    output.square().sum().backward()
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names)
    assert all(p.grad is not None and p.grad.any() for p in trained)
    torch.testing.assert_close(run(adapter.merge_and_unload()), output, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_of_a_block():
    from torch.utils.checkpoint import checkpoint

    plain, saved = tiny.adapter(), tiny.adapter()
    for block in saved.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for adapter in (plain, saved):
        run(adapter).square().sum().backward()
    for p, q in zip(plain.parameters(), saved.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_default_config_is_the_official_size():
    with torch.device("meta"):
        adapter = MoVAdapter(MoVAdapterConfig())
    assert sum(p.numel() for p in adapter.parameters()) == 151_515_661


def test_padded_hidden_channels_change_nothing():
    """What a GPU computes, on the CPU: 85 hidden channels as 128."""
    module = tiny.adapter().blocks[0].mlp.double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    parameters = list(module.parameters())
    expected, found = (
        (y, *torch.autograd.grad(y, parameters, torch.ones_like(y))) for y in (module(x), module._aligned(x))
    )
    torch.testing.assert_close(found, expected)
