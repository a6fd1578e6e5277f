"""Gates and attention maps against the dense computation in fp64, and that looking changes nothing."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from mova.inspection import attention_maps, recorded
from mova_kernels.dense_reference import feature_align, rope_tables

WIDE = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)  # the first beyond topk 2
POINT = (1, 4)


def true_inputs_and_gates(routing, config=tiny.CONFIG):
    """fp64: the tokens that enter each block, and (B, num_layers, N) gates from the dense reference's raw logits."""
    base, experts, text = tiny.inputs(config)
    trace: dict[str, list[torch.Tensor]] = {}
    tiny.truth(base, experts, routing, text, config, trace=trace)
    first = base.double() + tiny.parameters(config)["pos_embed"].double()
    gates = []
    for logits in trace["gate_logits"]:
        odds = logits.exp() * routing
        least = odds.sort(1, descending=True).values[:, min(config.topk, config.num_experts) - 1, None]
        odds = torch.where(odds >= least, odds, 0)
        gates.append(torch.where(odds > 0, odds / odds.sum(1, keepdim=True), 0))
    return [first, *trace["block_outputs"]], torch.stack(gates, 1)


def true_map(x, feature, grid, sample, e, block, config=tiny.CONFIG):
    """(R, R) of POINT in fp64: the attention of all queries to all keys, turned as complex numbers."""
    name = f"blocks.{block}"
    p = {key: value.double() for key, value in tiny.parameters(config).items() if key.startswith(name)}
    norm1, norm2 = ((p[f"{name}.norm{i}.{e}.weight"], p[f"{name}.norm{i}.{e}.bias"]) for i in (1, 2))
    context = feature_align(feature[sample : sample + 1].double(), grid, config.resolution)[0]
    q = F.layer_norm(x[sample], x.shape[2:], *norm1) @ p[f"{name}.cross_attn.{e}.q_proj.weight"].T
    k = F.layer_norm(context, context.shape[1:], *norm2) @ p[f"{name}.cross_attn.{e}.k_proj.weight"].T
    cos, sin = rope_tables(config, "cpu", torch.float64)
    turn = torch.complex(cos, sin)[:, None, ::2]
    q, k = (torch.view_as_complex(t.unflatten(1, (config.num_heads, -1, 2))) * turn for t in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k.conj()).real / config.head_channels**0.5
    attention = scores.softmax(-1).mean(0)
    return attention[POINT[0] * config.resolution + POINT[1]].unflatten(0, (config.resolution,) * 2)


@pytest.mark.parametrize("routing", [tiny.ROUTING, WIDE], ids=["up to topk", "beyond topk"])
def test_gates(routing):
    adapter = tiny.adapter()
    base, experts, text = tiny.inputs()
    with recorded(adapter) as record:
        adapter(base, experts, routing, text, grids=tiny.GRIDS)
    _, truth = true_inputs_and_gates(routing)
    assert record.gates.dtype == torch.float32 and record.gates.shape == (4, 2, 3)
    torch.testing.assert_close(record.gates.double(), truth, atol=1e-5, rtol=0)
    assert torch.equal(record.gates > 0, truth > 0)
    assert torch.equal(record.gates[1], torch.zeros(2, 3))


def test_gates_are_those_of_the_blocks(monkeypatch):
    """Bit by bit, also where the adapter computes in bf16."""
    adapter = tiny.adapter(dtype=torch.bfloat16)
    base, experts, text = tiny.inputs(dtype=torch.bfloat16)
    used = []
    original = type(adapter.blocks[0])._gate
    monkeypatch.setattr(type(adapter.blocks[0]), "_gate", lambda *a: used.append(original(*a)) or used[-1])
    with recorded(adapter) as record:
        adapter(base, experts, WIDE, text, grids=tiny.GRIDS)
    assert torch.equal(record.gates, torch.stack([weights for weights, _ in used], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_recording_changes_no_bit_and_stays_fused(dtype):
    adapter = tiny.adapter(dtype=dtype)
    base, experts, text = tiny.inputs(dtype=dtype)
    before = adapter(base, experts, WIDE, text, grids=tiny.GRIDS)
    before.float().square().sum().backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    with recorded(adapter) as record:
        assert all(block.modules_to_call() == [] for block in adapter.blocks)
        after = adapter(base, experts, WIDE, text, grids=tiny.GRIDS)
    after.float().square().sum().backward()
    assert torch.equal(before, after) and not record.gates.requires_grad
    assert all(torch.equal(p.grad, g) for p, g in zip(adapter.parameters(), gradients, strict=True))


def test_batch_without_experts_asks_no_gate():
    adapter = tiny.adapter()
    base, experts, text = tiny.inputs()
    none = torch.zeros(4, 3)
    for question in (None, text):
        with recorded(adapter) as record:
            adapter(base, [None] * 3, none, question)
        assert torch.equal(record.gates, torch.zeros(4, 2, 3))
    assert attention_maps(adapter, base, experts, none, None, POINT, grids=tiny.GRIDS) == [{}, {}, {}, {}]


def test_last_forward_counts():
    adapter = tiny.adapter()
    base, experts, text = tiny.inputs()
    with recorded(adapter) as record:
        adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
        adapter(base[3:], [f[3:] for f in experts], tiny.ROUTING[3:], text[3:], grids=tiny.GRIDS)
        with pytest.raises(ValueError):
            adapter(base[:1], experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    assert record.gates.shape == (1, 2, 3)
    assert torch.equal(record.gates[0] > 0, tiny.ROUTING[3].expand(2, 3))


def hooks_of(adapter):
    return [h for m in adapter.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_hooks_are_gone_even_after_errors():
    adapter = tiny.adapter()
    base, experts, _ = tiny.inputs()
    with pytest.raises(KeyError), recorded(adapter) as record:
        assert len(hooks_of(adapter)) == 5
        raise KeyError
    assert not hooks_of(adapter)
    with pytest.raises(RuntimeError, match="nothing is recorded"):
        _ = record.gates
    with pytest.raises(ValueError):
        attention_maps(adapter, base, experts, tiny.ROUTING, None, POINT, grids=tiny.GRIDS)
    assert not hooks_of(adapter)


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_attention_maps(block, is_packed):
    adapter = tiny.adapter()
    base, experts, text = tiny.inputs()
    given = tiny.packed(experts, tiny.ROUTING) if is_packed else experts
    maps = attention_maps(adapter, base, given, tiny.ROUTING, text, POINT, block=block, grids=tiny.GRIDS)
    entering, _ = true_inputs_and_gates(tiny.ROUTING)
    assert [list(m) for m in maps] == [[0, 1], [], [1], [0, 2]]
    for sample, found in enumerate(maps):
        for e, weights in found.items():
            assert weights.dtype == torch.float32 and weights.shape == (6, 6) and not weights.requires_grad
            torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
            truth = true_map(entering[block % 2], experts[e], tiny.GRIDS[e], sample, e, block % 2)
            torch.testing.assert_close(weights.double(), truth, atol=2e-6, rtol=1e-4)
            assert truth.max() > 1.5 / 36  # something to tell apart


def test_attention_maps_of_all_experts_on_square_grids_in_bf16():
    config = tiny.square_config(3)
    adapter = tiny.adapter(config, torch.bfloat16)
    base, experts, text = tiny.inputs(config, grids=((6, 6), (3, 3), (4, 4)), dtype=torch.bfloat16)
    maps = attention_maps(adapter, base, experts, None, text[:1], POINT)
    assert [list(m) for m in maps] == [[0, 1, 2]] * 4
    for found in maps:
        torch.testing.assert_close(torch.stack(list(found.values())).sum((1, 2)), torch.ones(3))


def test_attention_maps_see_adapted_weights():
    """A wrapped projection, as LoRA makes it, is called and not bypassed."""
    adapter = tiny.adapter(replace(tiny.CONFIG, num_layers=1))
    base, experts, text = tiny.inputs()
    adapter.blocks[0].cross_attn[0].q_proj.register_forward_hook(lambda *a: 0 * a[2])
    maps = attention_maps(adapter, base, experts, tiny.ROUTING, text, POINT, grids=tiny.GRIDS)
    torch.testing.assert_close(maps[0][0], torch.full((6, 6), 1 / 36))
    assert maps[0][1].std() > 1e-3


BAD = {
    "adapter": ({"adapter": torch.nn.Identity()}, TypeError, "adapter must be a MoVAdapter, got 'Identity'"),
    "block": ({"block": 2}, ValueError, "block must be from -2 to 1, got 2"),
    "block: type": ({"block": 1.0}, TypeError, "block must be an int"),
    "point: length": ({"point": (1, 2, 3)}, TypeError, "point must be (row, column)"),
    "point: outside": ({"point": (0, 6)}, ValueError, "point[1] must be from 0 to 5, got 6"),
    "point: type": ({"point": (0.5, 1)}, TypeError, "point[0] must be an int"),
    "of the forward": ({"routing": torch.ones(4, 2)}, ValueError, "routing must have shape (4, 3)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changed, error, message = BAD[case]
    base, experts, text = tiny.inputs()
    arguments = {"adapter": tiny.adapter(), "base": base, "experts": experts, "routing": tiny.ROUTING, "text": text}
    with pytest.raises(error, match=re.escape(message)):
        attention_maps(**{**arguments, "point": POINT, "grids": tiny.GRIDS, **changed})


def test_recorded_wants_an_adapter():
    with pytest.raises(TypeError, match="adapter must be a MoVAdapter"), recorded(torch.nn.Identity()):
        pass
