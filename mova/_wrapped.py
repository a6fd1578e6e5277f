"""Modules that other libraries have wrapped or hooked: find the class inside, and the device of the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar, cast

import torch
from torch import nn

from ._checks import check

Module = TypeVar("Module", bound=nn.Module)


def unwrapped(module: nn.Module, kind: type[Module]) -> Module:
    """The module of this class whose forward runs when ``module`` is called.

    Looks into torch.compile's OptimizedModule, peft's ModulesToSaveWrapper, checkpoint wrappers, FSDP and DDP.

    Raises:
        TypeError: there is no such module.
    """
    found: object = module
    while isinstance(found, nn.Module) and not isinstance(found, kind):
        found = _inner(found)
    check(isinstance(found, kind), "adapter", f"must be a {kind.__name__}", type(module).__name__, TypeError)
    return cast(Module, found)


def _inner(module: nn.Module) -> object:
    parts = module._modules
    if "modules_to_save" in parts:  # peft's wrapper: it holds a trained copy of the original for each adapter
        copies: object = parts["modules_to_save"]
        active = getattr(module, "active_adapters", [])
        trained = not getattr(module, "disable_adapters", False) and bool(active)
        if trained and isinstance(copies, nn.ModuleDict) and all(name in copies for name in active):
            return copies[active[0]]
        return parts["original_module"]
    names = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
    return next((parts[name] for name in names if name in parts), None)


def without_graphs(module: nn.Module) -> AbstractContextManager[object]:
    """Run compiled parts of the module eagerly: a graph does not call hooks that are registered after compilation."""
    parts = module.modules()
    compiled = any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in parts)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def compute_device(module: nn.Module) -> torch.device:
    """Return the device on which the module computes. If accelerate offloads its weights, they lie elsewhere."""
    device = _hook_device(module)
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        hooked = (_hook_device(part) for part in module.modules())
        device = next((found for found in hooked if found is not None), device)
    return device


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of the module's first floating-point parameter; accelerate keeps it for offloaded weights."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _hook_device(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook has several
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
