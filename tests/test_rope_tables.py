"""The rotary tables are right however an adapter was built, loaded, moved or copied."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import tiny
import torch
import transformers

from mova_kernels import MoVAdapter, ops

BASE, EXPERTS, TEXT = tiny.inputs()


def run(adapter):
    with torch.no_grad():
        return adapter(BASE, EXPERTS, tiny.ROUTING, TEXT, grids=tiny.GRIDS)


def on_meta():
    with torch.device("meta"):
        return MoVAdapter(tiny.CONFIG)


def empty():
    with accelerate.init_empty_weights(include_buffers=True):
        return MoVAdapter(tiny.CONFIG)


def assigned(adapter):
    adapter.load_state_dict(tiny.parameters(), assign=True)
    return adapter


def copied(adapter):
    adapter.load_state_dict(tiny.parameters())
    return adapter


def inferred():
    with torch.inference_mode():
        return MoVAdapter(tiny.CONFIG)


def used_on_meta(adapter):
    """Its tables are used on the meta device first, and kept there."""
    adapter.rope.tables(torch.empty(0, device="meta"))
    return adapter


WAYS = {
    "meta, assigned": lambda: assigned(on_meta()),
    "meta, emptied": lambda: copied(on_meta().to_empty(device="cpu")),
    "accelerate": lambda: assigned(empty()),
    "accelerate, emptied": lambda: copied(empty().to_empty(device="cpu")),
    "copy between": lambda: assigned(copy.deepcopy(on_meta())),
    "copy after": lambda: copy.deepcopy(assigned(on_meta())),
    "pickle between": lambda: assigned(pickle.loads(pickle.dumps(on_meta()))),
    "pickle": lambda: pickle.loads(pickle.dumps(tiny.adapter())),
    "to meta and back": lambda: copied(tiny.adapter().to("meta").to_empty(device="cpu")),
    "moved after": lambda: assigned(on_meta()).to("cpu"),
    "used elsewhere": lambda: used_on_meta(tiny.adapter()),
    "inference mode": lambda: assigned(inferred()),
    "half and back": lambda: copied(tiny.adapter().half().float()),
    "cast buffers": lambda: cast_buffers(tiny.adapter()),
    "offload": lambda: accelerate.cpu_offload(tiny.adapter(), "cpu"),
    "offload, buffers, too": lambda: accelerate.cpu_offload(tiny.adapter(), "cpu", offload_buffers=True),
}


def cast_buffers(adapter):
    """What a mixed-precision wrapper does to all that it finds."""
    for buffer in adapter.buffers():
        buffer.data = buffer.data.bfloat16().float()
    return adapter


@pytest.mark.parametrize("way", WAYS)
def test_results_are_those_of_an_ordinary_adapter(way):
    adapter = WAYS[way]()
    expected = run(tiny.adapter())
    found = [run(adapter), run(adapter)]
    if way.startswith("offload"):  # hooked modules are called one by one
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found[0], expected)
    assert torch.equal(*found)


def test_tables_made_in_inference_mode_can_be_trained_with():
    adapter = assigned(on_meta())
    with torch.inference_mode():
        run(adapter)
    adapter(BASE, EXPERTS, tiny.ROUTING, TEXT, grids=tiny.GRIDS).sum().backward()
    assert adapter.blocks[0].self_attn.q_proj.weight.grad.isfinite().all()


def test_the_tables_are_no_part_of_the_state_and_kept_between_calls():
    adapter = assigned(on_meta())
    assert not list(adapter.buffers())
    first, again = adapter.rope.tables(BASE), adapter.rope.tables(BASE)
    assert all(a is b for a, b in zip(first, again, strict=True))
    for table, expected in zip(first, ops.rope2d_table(6, 16), strict=True):
        assert torch.equal(table, expected)


def test_a_fake_table_is_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode

    adapter = tiny.adapter()
    with FakeTensorMode():
        fake = adapter.rope.tables(torch.empty(1))[0]
    assert type(fake) is not torch.Tensor
    assert torch.equal(run(adapter), run(tiny.adapter()))


class Model(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.adapter = MoVAdapter(tiny.CONFIG)
        self.post_init()


def test_a_transformers_model_with_an_adapter_inside(tmp_path):
    """It is built on the meta device, and what is in no file gets memory that nobody wrote."""
    model = Model(transformers.PretrainedConfig())
    model.adapter.load_state_dict(tiny.parameters())
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert torch.equal(run(loaded.adapter), run(tiny.adapter()))
