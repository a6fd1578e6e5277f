"""The whole adapter on its Triton kernels, in the interpreter: TRITON_INTERPRET=1 pytest tests -k triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
from helpers import check_budget
from torch import Tensor

from mova_kernels import MoVAdapterConfig, backends, device_routing, use_backend
from mova_kernels.dense_reference import dense_adapter

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")

CONFIG = replace(tiny.CONFIG, topk=1, in_channels=64, expert_channels=(8, 16), resolution=4)
ROUTINGS = {
    "mixed, one sample beyond top-k": torch.tensor([[1, 0], [0, 0], [1, 1]]).bool(),
    "the same expert for everybody": torch.tensor([[0, 1], [0, 1], [0, 1]]).bool(),
    "nothing": torch.zeros(3, 2, dtype=torch.bool),
}


def on_triton():
    """Every op which has Triton kernels on them."""
    ops = [op for op in backends.ops() if "triton" in backends._TABLE[op]]
    assert {"ragged_linear", "expert_attention", "gated_combine"} <= set(ops)
    return use_backend(",".join(f"{op}=triton" for op in ops))


def inputs(
    dtype: torch.dtype = torch.float32, config: MoVAdapterConfig = CONFIG
) -> tuple[Tensor, list[Tensor], Tensor]:
    return tiny.inputs(config, 3, ((3, 3), (2, 2)), dtype)


def outcome(module, adapter, base: Tensor, experts: list[Tensor], routing: Tensor, text: Tensor) -> list[Tensor]:
    """The output and the gradients of base, experts and all parameters, zeros for those without."""
    leaves = [base, *experts, *adapter.parameters()]
    y = module(base.requires_grad_(), [f.requires_grad_() for f in experts], routing, text)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def check(found: list[Tensor], adapter, base: Tensor, experts: list[Tensor], routing: Tensor, text: Tensor) -> None:
    """What outcome() found against fp64, all gradients as one vector: at most twice the error of plain torch."""
    wide, leaves = deepcopy(adapter).double(), [x.detach().double() for x in (base, *experts)]
    with use_backend("reference"):
        plain = outcome(adapter, adapter, base, experts, routing, text)
        truth = outcome(wide, wide, leaves[0], leaves[1:], routing, text.double())
    check_budget("output", found[0], truth[0], plain[0])
    gradients = (torch.cat([x.flatten() for x in tensors[1:]]) for tensors in (found, truth, plain))
    check_budget("gradients", *gradients, norms=(2,))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Nothing may ask a tensor for its values, as under a CUDA graph."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
            patch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} was called"))
        yield


@contextmanager
def only_replaying() -> Iterator[None]:
    with no_host_reads(), torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("name", ROUTINGS)
def test_adapter(name) -> None:
    adapter = tiny.adapter(CONFIG)
    base, experts, text = inputs()
    with on_triton():
        found = outcome(adapter, adapter, base, experts, ROUTINGS[name], text)
    check(found, adapter, base, experts, ROUTINGS[name], text)


def test_one_compiled_graph_serves_every_routing_without_asking_the_host() -> None:
    """The pairs are padded, and their number is known on the device alone: what a CUDA graph needs, too."""
    config = replace(CONFIG, num_layers=1, resolution=2)  # neither blocks nor tokens change what the graph must serve
    adapter = tiny.adapter(config)
    base, experts, text = inputs(config=config)
    torch._dynamo.reset()
    module = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    compiling = nullcontext()
    for name in ("nothing", "the same expert for everybody", "mixed, one sample beyond top-k"):
        with on_triton(), compiling:
            found = outcome(module, adapter, base, experts, ROUTINGS[name], text)
        check(found, adapter, base, experts, ROUTINGS[name], text)
        compiling = only_replaying()


def test_device_routing_needs_no_host() -> None:
    """What a CUDA graph captures, forward and backward, run eagerly."""
    adapter = tiny.adapter(CONFIG)
    base, experts, text = inputs()
    routing = ROUTINGS["mixed, one sample beyond top-k"]
    with on_triton(), device_routing(), no_host_reads():
        found = outcome(adapter, adapter, base, experts, routing, text)
    check(found, adapter, base, experts, routing, text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype) -> None:
    """Against fp64; at most twice the error of the official computation in the same dtype."""
    base, experts, text = inputs(dtype)
    routing = ROUTINGS["mixed, one sample beyond top-k"]
    truth = tiny.truth(base, experts, routing, text, CONFIG, ((3, 3), (2, 2)))
    official = {name: p.to(dtype) for name, p in tiny.parameters(CONFIG).items()}
    plain = dense_adapter(official, CONFIG, base, experts, routing, text, grids=((3, 3), (2, 2)))
    with on_triton():
        output = tiny.adapter(CONFIG, dtype)(base, experts, routing, text)
    check_budget("output", output.detach(), truth, plain)
