"""The adapter as an ONNX graph: one for every routing and every batch size. What traces one routing is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import mask
from torch import nn

from mova_kernels import BackendError, RaggedPairs, _compiled, ops, use_backend

onnx_reference = pytest.importorskip("onnx.reference")
pytest.importorskip("onnxscript")

ROUTINGS = {
    "the one exported": tiny.ROUTING,
    "another": mask("x.x", ".xx", "xx.", "..."),
    "nobody": mask("...", "...", "...", "..."),
    "everybody": mask("xxx", "xxx", "xxx", "xxx"),
    "fewer samples": mask(".x."),
    "more samples": mask("x..", "...", ".x.", "xxx", "..x", "xx.", "..."),
}


class Adapter(nn.Module):
    """What a user would export: the grids are part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = tiny.adapter()

    def forward(self, base, experts, routing, text):
        return self.adapter(base, experts, routing, text, grids=tiny.GRIDS)


@pytest.fixture(scope="module", params=["a module", "an exported program"])
def graph(request):
    base, experts, text = tiny.inputs()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = {"base": batch, "experts": [batch] * len(experts), "routing": batch, "text": batch}
    module, arguments = Adapter().eval(), (base, experts, tiny.ROUTING, text)
    if request.param == "a module":
        program = torch.onnx.export(module, arguments, dynamic_shapes=shapes, dynamo=True, verbose=False)
    else:
        with use_backend("reference"):
            exported = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=True)
        assert not [node for node in exported.graph.nodes if "mova_kernels" in str(node.target)]
        program = torch.onnx.export(exported, verbose=False)
    return onnx_reference.ReferenceEvaluator(program.model_proto)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_every_routing_and_batch_size(graph, routing) -> None:
    base, experts, text = tiny.inputs(num_samples=len(routing))
    inputs = (base, *experts, routing, text)
    feeds = dict(zip(graph.input_names, (x.numpy() for x in inputs), strict=True))
    found = torch.from_numpy(graph.run(None, feeds)[0])
    expected = tiny.truth(base, experts, routing, text).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(_compiled.cpu_reason() is not None, reason=str(_compiled.cpu_reason()))
def test_a_kernel_by_name_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(BackendError, match="an ONNX graph knows the operators of the reference alone"):
        ops.feature_resample(torch.randn(1, 4, 8), (2, 2), (3, 3), backend="cpu")


def test_tracing_a_routing_is_refused() -> None:
    base, experts, text = tiny.inputs()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep this routing .* torch\.export\.export"):
        torch.jit.trace(Adapter(), (base, experts, tiny.ROUTING, text))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would keep this routing"):
        torch.jit.trace(lambda routing: RaggedPairs.from_routing(routing).sample, tiny.ROUTING)


def test_an_op_that_is_traced_reads_its_input() -> None:
    first, other = torch.randn(2, 1, 4, 8)
    function = lambda x: ops.feature_norm([x], [(2, 2)], (3, 3), [None])[0]  # noqa: E731
    traced = torch.jit.trace(function, first)
    assert "mova_kernels::" not in str(traced.graph)
    torch.testing.assert_close(traced(other), function(other))
