"""The whole adapter under torch.compile(fullgraph=True) and torch.export: one graph for every routing."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

ROUTINGS = {
    "ragged": tiny.ROUTING,
    "nobody": torch.zeros(4, 3, dtype=torch.bool),
    "everybody, more than topk": torch.ones(4, 3, dtype=torch.bool),
    "one expert": torch.eye(3, dtype=torch.bool)[[1, 1, 1, 1]],
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_one_inference_graph_serves_every_routing():
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adapter, fullgraph=True, backend=counter)
    with torch.no_grad():
        for routing in ROUTINGS.values():
            expected = adapter(base, experts, routing, text, grids=tiny.GRIDS)
            close(compiled(base, experts, routing, text, grids=tiny.GRIDS), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_two_graphs_serve_every_batch_size(layout):
    """The first batch size is a constant of its graph, the second one makes it a variable."""
    adapter = tiny.adapter()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adapter, fullgraph=True, backend=counter)
    for num_samples in (5, 8, 11):
        base, experts, text = tiny.inputs(num_samples=num_samples)
        routing = torch.arange(num_samples)[:, None] % torch.tensor([2, 3, 2]) == 0
        given = tiny.packed(experts, routing) if layout == "packed" else experts
        with torch.no_grad():
            expected = adapter(base, given, routing, text, grids=tiny.GRIDS)
            close(compiled(base, given, routing, text, grids=tiny.GRIDS), expected)
    assert counter.frame_count == 2


def test_one_training_graph_serves_every_routing():
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(adapter, fullgraph=True, backend=counter)
    leaves = [t.requires_grad_() for t in (base, *experts, text)]

    def gradients(module, routing):
        adapter.zero_grad()
        for leaf in leaves:
            leaf.grad = None
        module(base, experts, routing, text, grids=tiny.GRIDS).square().sum().backward()
        # What nobody selected has a gradient of zeros in the graph, and None outside.
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in (*adapter.parameters(), *leaves)]

    for routing in ROUTINGS.values():
        for actual, expected in zip(gradients(compiled, routing), gradients(adapter, routing), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-6)
    assert counter.frame_count == 1


def test_inductor():
    config = tiny.square_config(2, num_layers=1, in_channels=8, num_heads=1)
    adapter = tiny.adapter(config)
    base, experts, text = tiny.inputs(config, 2, ((4, 4), (6, 6)))
    compiled = torch.compile(adapter, fullgraph=True)
    routing = torch.tensor([[1, 0], [1, 1]])
    with torch.no_grad():
        close(compiled(base, experts, routing, text), adapter(base, experts, routing, text))


def test_autocast_inside_the_graph():
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
        actual = compiled(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    actual.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_packed_features_and_unselected_none():
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    routing = tiny.ROUTING & torch.tensor([True, True, False])
    packed = tiny.packed(experts, routing)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = adapter(base, packed, routing, text, grids=tiny.GRIDS)
        close(compiled(base, packed, routing, text, grids=tiny.GRIDS), expected)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (2 * tiny.ROUTING.long(), "routing must hold only 0 and 1"),
        (tiny.ROUTING.flip(0).long(), r"experts\[1\] must have B rows, or one for each"),
    ],
)
def test_bad_values_are_found_inside_the_graph(routing, message):
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    experts[1] = experts[1][:1]
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        compiled(base, experts, routing, text, grids=tiny.GRIDS)


@pytest.mark.parametrize("strict", [False, True])
def test_export_serves_every_routing(strict, tmp_path):
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    arguments = (base, experts, tiny.ROUTING, text)
    program = torch.export.export(adapter, arguments, {"grids": tiny.GRIDS}, strict=strict)
    torch.export.save(program, tmp_path / "adapter.pt2")
    exported = torch.export.load(tmp_path / "adapter.pt2").module()
    for routing in ROUTINGS.values():
        expected = adapter(base, experts, routing, text, grids=tiny.GRIDS)
        close(exported(base, experts, routing, text, grids=tiny.GRIDS), expected)


def test_a_hooked_expert_is_refused_inside_the_graph_and_named():
    adapter, (base, experts, text) = tiny.adapter(), tiny.inputs()
    adapter.blocks[1].cross_attn[2].v_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"cross_attn\.2\.v_proj is hooked, wrapped or replaced"):
        torch.export.export(adapter, (base, experts, tiny.ROUTING, text), {"grids": tiny.GRIDS})
