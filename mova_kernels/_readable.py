"""Whether an op may compute with a module's weights instead of calling the module.

It may if everything that the module's forward reads is unchanged since the module was built: then the op and the module
compute the same. Otherwise the module has to be called. ``_READS`` lists what the forward of each of PyTorch's classes
reads; our own classes declare it with :func:`reads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from ._gradients import layer_norm
from ._plain import autocast, other_derivatives

_READS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (),
    nn.LayerNorm: ("normalized_shape", "eps"),
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.ModuleList: (),
}
_FORWARDS: list[tuple[Any, str, Any]] = [(kind, "forward", kind.forward) for kind in _READS]
_FORWARDS.append((nn.Conv2d, "_conv_forward", nn.Conv2d._conv_forward))
# The functions that a call of these modules runs through; torch.export replaces some of them itself.
_CALLS: list[tuple[Any, str]] = [(kind, "__call__") for kind in (nn.Module, *_READS)]
_CALLS += [(nn.Module, "_call_impl"), (F, "linear"), (F, "layer_norm"), (F, "adaptive_avg_pool2d")]
_CALLED = [(where, name, getattr(where, name)) for where, name in _CALLS]
_TENSORS = ("weight", "bias")  # the names of all parameters of these classes
_PLAIN_TENSORS = {nn.Parameter, Tensor, FakeTensor}  # torch.export traces with FakeTensor

_STRIDED = torch.strided

Class = TypeVar("Class", bound=type[nn.Module])


class Description(NamedTuple):
    """The state that the forward of a module reads, as it was when the module was built.

    Attributes:
        kind: its class.
        attributes: names and values.
        tensors: names and shapes; None where there is no such tensor (a Linear without bias).
        children: names and descriptions.
    """

    kind: type[nn.Module]
    attributes: tuple[tuple[str, object], ...]
    tensors: tuple[tuple[str, tuple[int, ...] | None], ...]
    children: tuple[tuple[str, Description], ...]


def reads(*attributes: str) -> Callable[[Class], Class]:
    """Declare that the forward of a class reads its children, and these attributes of the module."""

    def declare(kind: Class) -> Class:
        _READS[kind] = attributes
        _FORWARDS.append((kind, "forward", kind.forward))
        return kind

    return declare


def describe(module: nn.Module) -> Description:
    """The description of a module of a declared class, with all its parts."""
    kind, parameters = type(module), module._parameters
    shapes = ((name, parameters[name]) for name in _TENSORS if name in parameters)
    return Description(
        kind,
        tuple((name, getattr(module, name)) for name in _READS[kind]),
        tuple((name, None if tensor is None else tuple(tensor.shape)) for name, tensor in shapes),
        tuple((name, describe(child)) for name, child in module.named_children()),
    )


def is_readable(module: nn.Module, description: Description, like: Tensor | None = None) -> bool:
    """Whether the module still is what was described, and so are all its parts.

    With ``like``, all tensors must also be on its device and, outside autocast, have its dtype; under autocast they
    must have one dtype.
    """
    tensors: list[Tensor] = []
    if not (classes_are_original() and _fits(module, description, tensors)):
        return False
    if like is None or not tensors:
        return True
    device = like.device
    dtype = tensors[0].dtype if autocast(device.type) else like.dtype
    for tensor in tensors:
        if tensor.dtype != dtype or tensor.device != device:
            return False
    return True


def unreadable(parent: nn.Module, name: str, description: Description, like: Tensor | None = None) -> list[str]:
    """The names, from ``parent``, of the parts because of which its child ``name`` is not readable."""
    if not classes_are_original():
        return ["every module (by a hook for all, or by a new forward of its class)"]
    module = parent._modules.get(name)
    if type(module) is not description.kind:
        return [name]
    parts = [f"{name}.{part}" for child, d in description.children for part in unreadable(module, child, d, like)]
    return parts if parts or is_readable(module, description, like) else [name]


def is_plain_linear(module: nn.Module, x: Tensor) -> bool:
    """Whether the module is F.linear of x, (..., C), its weight, (O, C), and its bias, (O,), if it has one."""
    state = vars(module)
    if type(module) is not nn.Linear or _is_hooked(state) or not classes_are_original():
        return False
    weight, bias = _tensor(state, "weight"), _tensor(state, "bias")
    if type(weight) not in _PLAIN_TENSORS or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return False
    if weight.device != x.device:
        return False
    if bias is None:
        return True
    return type(bias) in _PLAIN_TENSORS and bias.shape == weight.shape[:1] and bias.device == x.device


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The result of a LayerNorm over the last dimension of ``x``, with every derivative; of another module, its own.

    Raises:
        ValueError: a parameter is on the meta device.
    """
    if other_derivatives() and type(module) is nn.LayerNorm and not _is_hooked(vars(module)) and classes_are_original():
        if module.normalized_shape == x.shape[-1:]:
            return layer_norm(x, module.weight, module.bias, module.eps)
    if torch.compiler.is_compiling():
        return module(x)
    try:
        return module(x)
    except RuntimeError:
        refuse_meta(module, x)
        raise


def refuse_meta(module: nn.Module, x: Tensor, name: str = "") -> None:
    """Refuse to call a module on ``x`` if it lacks data: some of PyTorch's forwards would return unwritten memory.

    A hooked module may be about to load its data, as those of accelerate do.

    Raises:
        ValueError: a parameter is on the meta device.
    """
    if x.is_meta or torch.compiler.is_compiling() or _is_hooked(vars(module)):
        return
    name = name or type(module).__name__
    for part, tensor in module._parameters.items():
        if tensor is not None and tensor.is_meta:
            raise ValueError(f"{name}.{part} must hold data, got a tensor on the meta device")
    for part, child in module._modules.items():
        if child is not None:
            refuse_meta(child, x, f"{name}.{part}")


def classes_are_original() -> bool:
    """Whether there is no hook for all modules, and the functions that a call runs through are PyTorch's own."""
    if torch_module._has_any_global_hook():
        return False
    for kind, name, function in _FORWARDS:
        if getattr(kind, name) is not function:
            return False
    if not torch.compiler.is_compiling():
        for where, name, function in _CALLED:
            if getattr(where, name) is not function:
                return False
    return True


def _fits(module: nn.Module, description: Description, tensors: list[Tensor]) -> bool:
    # This runs for a hundred modules at each forward: hence plain loops, and vars() instead of getattr.
    kind, attributes, shapes, children = description
    if type(module) is not kind:
        return False
    state = vars(module)
    if _is_hooked(state):
        return False
    for name, value in attributes:
        if state.get(name) != value:
            return False
    if shapes:
        parameters = state["_parameters"]
        for name, shape in shapes:
            tensor = parameters[name] if name in parameters and name not in state else _tensor(state, name)
            if shape is None:
                if tensor is not None:
                    return False
            elif type(tensor) in _PLAIN_TENSORS and tensor.shape == shape and tensor.layout is _STRIDED:
                tensors.append(tensor)
            else:
                return False
    if not children:
        return True
    modules = state["_modules"]
    if len(modules) != len(children):
        return False
    for (name, child), (inner_name, inner) in zip(children, modules.items(), strict=True):
        if name != inner_name or inner is None or not _fits(inner, child, tensors):
            return False
    return True


def _is_hooked(state: dict[str, Any]) -> bool:
    """Whether calling the module does something else, or more, than the forward of its class."""
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_conv_forward" in state
        or "_call_impl" in state
        or "_slow_forward" in state
        or "_compiled_call_impl" in state
    )


def _tensor(state: dict[str, Any], name: str) -> Any:
    """The value of ``module.name``, which is not the parameter if an attribute hides it."""
    if name in state:
        return state[name]
    parameters = state["_parameters"]
    return parameters[name] if name in parameters else state["_buffers"].get(name, ())
