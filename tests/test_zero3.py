"""An adapter whose parameters are empty until the module that owns them is called, as under DeepSpeed's ZeRO-3; and one
whose gradients must come in the same order in every process, as ZeRO-2 needs it.

DeepSpeed itself takes too long to install for a test: this stands in for what it does to modules in a forward, and to
parameters.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import tiny
import torch

from mova_kernels import MoVAdapter


def partition(module, calls):
    """Empty all parameters; each module fills its own for the time of its call, which it notes."""

    def fill(owner, *_):
        calls.append(owner)
        for parameter in owner.parameters(recurse=False):
            parameter.data = parameter.whole

    def empty(owner, *_):
        for parameter in owner.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for number, parameter in enumerate(module.parameters()):
        parameter.ds_id, parameter.whole = number, parameter.data
    for owner in module.modules():
        empty(owner)
        owner.register_forward_pre_hook(fill)
        owner.register_forward_hook(empty)


@pytest.fixture
def deepspeed(monkeypatch):
    """A deepspeed that has the one context which we use."""
    used = []

    @contextmanager
    def gathered(parameters, modifier_rank):
        used.append(modifier_rank)
        for parameter in parameters:
            parameter.data = parameter.whole
        yield
        for parameter in parameters:
            parameter.whole, parameter.data = parameter.data, torch.empty(0)

    module = ModuleType("deepspeed")
    module.zero = ModuleType("deepspeed.zero")
    module.zero.GatheredParameters = gathered
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return used


@torch.no_grad()
def test_the_modules_are_called_and_the_result_is_the_same():
    adapter, sharded = tiny.adapter(), tiny.adapter()
    partition(sharded, [])
    base, experts, text = tiny.inputs()
    arguments = (base, experts, tiny.ROUTING, text)
    torch.testing.assert_close(
        sharded(*arguments, grids=tiny.GRIDS), adapter(*arguments, grids=tiny.GRIDS), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_order_of_calls_does_not_depend_on_the_routing():
    adapter, calls = tiny.adapter(), []
    partition(adapter, calls)
    base, experts, text = tiny.inputs()
    orders = []
    for routing in (tiny.ROUTING, torch.zeros_like(tiny.ROUTING), tiny.ROUTING.roll(1, 1)):
        calls.clear()
        adapter(base, experts, routing, text, grids=tiny.GRIDS)
        orders.append([id(module) for module in calls])
    assert orders[0] == orders[1] == orders[2]
    assert {id(m) for m in adapter.modules() if list(m.parameters(recurse=False))} <= set(orders[0])


def test_the_initial_state_is_that_of_whole_parameters(deepspeed):
    adapter, expected = MoVAdapter(tiny.CONFIG), MoVAdapter(tiny.CONFIG)
    for parameter in adapter.parameters():
        parameter.data.fill_(float("nan"))
    partition(adapter, [])
    torch.manual_seed(3)
    adapter.reset_parameters()
    torch.manual_seed(3)
    expected.reset_parameters()
    assert deepspeed == [0]
    for (name, parameter), whole in zip(adapter.named_parameters(), expected.parameters(), strict=True):
        assert parameter.numel() == 0 and torch.equal(parameter.whole, whole), name


def test_idle_experts_cannot_be_left_out():
    adapter = tiny.adapter()
    partition(adapter, [])
    adapter.idle_expert_gradients = False
    base, experts, text = tiny.inputs()
    with pytest.raises(ValueError, match="idle_expert_gradients must be None or True where"):
        adapter(base, experts, tiny.ROUTING, text, grids=tiny.GRIDS)


def arrivals(adapter, routing, text=True) -> list[str]:
    """The names of the parameters in the order in which a backward pass brings their gradients."""
    order: list[str] = []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        for name, p in adapter.named_parameters()
    ]
    base, experts, given = tiny.inputs()
    adapter(base, experts, routing, given if text else None, grids=tiny.GRIDS).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return order


def test_under_zero2_gradients_come_in_an_order_that_does_not_depend_on_the_routing(deepspeed):
    adapter = tiny.adapter()
    one, other = torch.zeros_like(tiny.ROUTING), torch.zeros_like(tiny.ROUTING)
    one[:, 0], other[:, 2] = True, True
    adapter.idle_expert_gradients = True
    assert arrivals(adapter, one) != arrivals(adapter, other)  # which is what the others need not care about
    adapter.idle_expert_gradients = None
    expected = {name: p.grad for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    for number, parameter in enumerate(adapter.parameters()):
        parameter.param_idx_in_group = number
    orders = [arrivals(adapter, one), arrivals(adapter, other)]
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    nothing = torch.zeros_like(one)
    orders += [arrivals(adapter, tiny.ROUTING), arrivals(adapter, nothing), arrivals(adapter, nothing, text=False)]
    assert len(orders[0]) == len(expected) and all(order == orders[0] for order in orders)
