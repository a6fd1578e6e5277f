"""The whole adapter on Hopper's CUDA kernels, forward and backward, on the emulator; the other ops run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch
from emulated_gpu import cuda_on_cpu_tensors
from emulator import cuda
from helpers import check_budget
from test_adapter_triton import ROUTINGS, outcome

from mova_kernels import MoVAdapterConfig, backends, device_routing, use_backend

if cuda.reason():
    pytest.skip(f"nothing to emulate with: {cuda.reason()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CONFIG = replace(tiny.CONFIG, topk=1, in_channels=128, num_heads=2, expert_channels=(16, 24), resolution=4)
OPS = {"expert_attention": "attention_forward"}  # those with kernels for Hopper, and one of their kernels


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[cuda.Library]:
    if request.config.getoption("--gpu") not in (None, "sm_90"):
        pytest.skip("the kernels are for sm_90a alone")
    with cuda_on_cpu_tensors() as library, use_backend(",".join(f"{op}=cuda" for op in OPS)):
        yield library


def test_every_op_of_hopper_takes_part() -> None:
    assert set(OPS) == {file.parent.name for file in cuda.ROOT.glob("csrc/*/*_sm90a.cu")}
    assert all("cuda" in backends._TABLE[op] for op in OPS)


def problem(config: MoVAdapterConfig, dtype: torch.dtype):
    return tiny.inputs(config, 3, ((3, 3), (2, 2)), dtype)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter(dtype, name, library) -> None:
    """All gradients as one vector: at most twice the error of plain torch."""
    base, experts, text = problem(CONFIG, dtype)
    adapter, wide = tiny.adapter(CONFIG, dtype), tiny.adapter(CONFIG, dtype).double()
    arguments = base, experts, ROUTINGS[name], text
    found = outcome(adapter, adapter, *arguments)
    launched = {launch.name for launch in library.launches}
    assert all(any(kernel in launch for launch in launched) for kernel in OPS.values())
    with use_backend("reference"):
        plain = outcome(adapter, adapter, *arguments)
        truth = outcome(wide, wide, base.double(), [x.double() for x in experts], ROUTINGS[name], text.double())
    check_budget("output", found[0], truth[0], plain[0])
    gradients = (torch.cat([x.flatten() for x in tensors[1:]]) for tensors in (found, truth, plain))
    check_budget("gradients", *gradients, norms=(2,))


def test_device_routing_gives_the_same(library) -> None:
    """The pairs are padded then, and their number is known on the device alone."""
    base, experts, text = problem(CONFIG, torch.bfloat16)
    adapter = tiny.adapter(CONFIG, torch.bfloat16)
    routing = ROUTINGS["mixed, one sample beyond top-k"]
    expected = outcome(adapter, adapter, base, experts, routing, text)
    with device_routing():
        found = outcome(adapter, adapter, base, experts, routing, text)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
