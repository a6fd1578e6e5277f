"""Bad input is refused before anything is computed, with the argument, the rule and the value."""

from __future__ import annotations

import re

import pytest
import tiny
import torch

from mova_kernels import MoVAdapter, MoVAdapterConfig, RaggedPairs, split_concatenated

BASE, EXPERTS, TEXT = tiny.inputs()
META = torch.device("meta")


def arguments(**changes):
    given = {"base": BASE, "experts": EXPERTS, "routing": tiny.ROUTING, "text": TEXT, "grids": tiny.GRIDS}
    return {**given, **changes}


def experts(e, value):
    return [*EXPERTS[:e], value, *EXPERTS[e + 1 :]]


CALLS = {
    "base: rank": ({"base": BASE[0]}, ValueError, "base must have shape (B, 36, 32), got (36, 32)"),
    "base: tokens": ({"base": BASE[:, :30]}, ValueError, "base must have shape (B, 36, 32), got (4, 30, 32)"),
    "base: width": ({"base": BASE[..., :31]}, ValueError, "base must have shape (B, 36, 32), got (4, 36, 31)"),
    "base: type": ({"base": None}, TypeError, "base must be a tensor, got 'NoneType'"),
    "base: integers": ({"base": BASE.long()}, TypeError, "base must be floating point, got torch.int64"),
    "base: dtype": (
        {"base": BASE.double()},
        ValueError,
        "base must have the adapter's torch.float32, got torch.float64",
    ),
    "base: device": ({"base": BASE.to(META)}, ValueError, "base must be on the adapter's cpu, got device(type='meta')"),
    "experts: type": ({"experts": EXPERTS[0]}, TypeError, "experts must be a sequence, got 'Tensor'"),
    "experts: number": ({"experts": EXPERTS[:2]}, ValueError, "experts must have 3 entries, got 2"),
    "expert: type": ({"experts": experts(0, [1.0])}, TypeError, "experts[0] must be a tensor, got 'list'"),
    "expert: rank": (
        {"experts": experts(1, EXPERTS[1][0])},
        ValueError,
        "experts[1] must have shape (B or B_e, T_e, 8), got (36, 8)",
    ),
    "expert: width": (
        {"experts": experts(1, EXPERTS[1][..., :7])},
        ValueError,
        "experts[1] must have shape (B or B_e, T_e, 8), got (4, 36, 7)",
    ),
    "expert: selected but None": (
        {"experts": experts(1, None)},
        ValueError,
        "experts[1] must be given where a sample selected it, got None",
    ),
    "expert: packed rows": (
        {"experts": experts(0, EXPERTS[0][:3])},
        ValueError,
        "experts[0] must have B rows, or one for each sample that selected it, got {'rows': 3, 'B': 4, 'selected': 2}",
    ),
    "expert: dtype": (
        {"experts": experts(2, EXPERTS[2].bfloat16())},
        ValueError,
        "experts[2] must have base's torch.float32, got torch.bfloat16",
    ),
    "expert: device": (
        {"experts": experts(2, EXPERTS[2].to(META))},
        ValueError,
        "experts[2] must be on base's cpu, got device(type='meta')",
    ),
    "grid: no square": (
        {"grids": None},
        ValueError,
        "experts[2] must have a square number of tokens, or a grid in grids, got 15",
    ),
    "grids: number": ({"grids": tiny.GRIDS[:2]}, ValueError, "grids must have 3 entries, got 2"),
    "grid: other tokens": (
        {"grids": (*tiny.GRIDS[:2], (2, 5))},
        ValueError,
        "grids[2] must hold experts[2]'s 15 tokens, got (2, 5)",
    ),
    "routing: type": ({"routing": [[1, 0, 0]] * 4}, TypeError, "routing must be a tensor, got 'list'"),
    "routing: width": (
        {"routing": torch.ones(4, 2)},
        ValueError,
        "routing must have shape (4, 3), got (4, 2)",
    ),
    "routing: values": (
        {"routing": 2 * tiny.ROUTING.long()},
        ValueError,
        "routing must hold only 0 and 1, got [2]",
    ),
    "routing: a derivative": (
        {"routing": tiny.ROUTING.float().requires_grad_()},
        ValueError,
        "routing must not require grad, since selecting experts is not differentiable: pass routing.detach() and train "
        "the router with a loss of its own, got a routing with a derivative",
    ),
    "routing: device": (
        {"routing": tiny.ROUTING.to(META)},
        ValueError,
        "routing must be on the host or cpu, got device(type='meta')",
    ),
    "text: rank": ({"text": TEXT[0]}, ValueError, "text must have shape (B, 12), got (12,)"),
    "text: width": ({"text": TEXT[:, :11]}, ValueError, "text must have shape (B, 12), got (4, 11)"),
    "text: rows": ({"text": TEXT[:3]}, ValueError, "text must have 1 or 4 rows, got 3"),
    "text: dtype": ({"text": TEXT.double()}, ValueError, "text must have base's torch.float32, got torch.float64"),
    "text: missing": ({"text": None}, ValueError, "text must be given when a sample selected an expert, got None"),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward(name):
    changes, kind, message = CALLS[name]
    adapter = tiny.adapter()
    for module in adapter.modules():
        if module is not adapter:  # nothing may be computed
            module.register_forward_pre_hook(lambda module, args: pytest.fail("computed something"))
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        adapter(**arguments(**changes))


CONFIGS = {
    "head width": ({"in_channels": 36, "num_heads": 6}, ValueError, "in_channels must be num_heads * (a mult"),
    "topk": ({"topk": 0}, ValueError, "topk must be at least 1, got 0"),
    "no experts": ({"expert_channels": ()}, ValueError, "expert_channels must name 1 to 64 experts, got ()"),
    "65 experts": ({"expert_channels": (8,) * 65}, ValueError, "expert_channels must name 1 to 64 experts"),
    "expert width": ({"expert_channels": (8, 0)}, ValueError, "expert_channels[1] must be at least 1, got 0"),
    "resolution": ({"resolution": 1}, ValueError, "resolution must be at least 2, got 1"),
    "float": ({"num_heads": 16.0}, TypeError, "num_heads must be an int, got 16.0"),
    "bool": ({"num_layers": True}, TypeError, "num_layers must be an int, got True"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name):
    fields, kind, message = CONFIGS[name]
    with pytest.raises(kind, match=re.escape(message)):
        MoVAdapterConfig(**fields)


def test_adapter_needs_a_config():
    with pytest.raises(TypeError, match="config must be a MoVAdapterConfig, got 1024"):
        MoVAdapter(1024)


def test_split_concatenated():
    with pytest.raises(ValueError, match=re.escape("x must have shape (B, 36, 76), got (4, 36, 75)")):
        split_concatenated(torch.zeros(4, 36, 75), tiny.CONFIG)


def test_packed_flags():
    with pytest.raises(ValueError, match="packed must have 3 entries, got 2"):
        RaggedPairs.from_routing(tiny.ROUTING, [True, True])
