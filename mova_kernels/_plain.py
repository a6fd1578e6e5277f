"""Which tensors a kernel may read, and where their numbers lie in memory. Every raw op asks here.

A kernel reads numbers at an address and knows nothing else. A tensor may be more than numbers (batched by vmap, with a
tangent, of a subclass), or other numbers than its memory holds (lazily negated, sparse), or none at all (meta).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor)  # exporters and compilers trace with FakeTensor


def keys(x: Tensor) -> int:
    """The dispatch keys of ``x``, as one integer."""
    return torch._C._dispatch_keys(x).raw_repr()


_ACTIVE = getattr(torch._C, "_are_functorch_transforms_active", None)  # private: absent from some versions
_LOWEST = 1 << 36  # a tensor at a lower address may have no memory, see has_memory()
_EMPTY = torch.empty(0, device="cpu")
with torch.inference_mode():
    _PLAIN_KEYS = (keys(_EMPTY), keys(torch.empty(0, device="cpu")))


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is a CPU tensor, of no subclass, whose numbers are what its memory holds."""
    return type(x) in (Tensor, nn.Parameter) and keys(x) in _PLAIN_KEYS and has_memory(x, x.data_ptr())


def has_memory(x: Tensor, start: int) -> bool:
    """Whether ``x``, whose first number should be at the address ``start``, has memory."""
    # The address of a tensor without memory is its offset. Only the storage knows, but asking it takes longer.
    return start >= _LOWEST or bool(x.untyped_storage().data_ptr()) or not x.numel()


def transformed(tensors: Iterable[Tensor] = ()) -> str | None:
    """The transform that is active here besides one backward pass (other derivatives, or batching), or None."""
    if functorch_active():
        return "torch.func transforms (grad, vjp, jvp, vmap, ...) are active, and only the reference goes with them"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "a tensor has a tangent (forward-mode AD), which only the reference passes on"
    return None


def functorch_active() -> bool:
    """Whether torch.func transforms are on."""
    return _ACTIVE is not None and _ACTIVE()


def other_derivatives() -> bool:
    """Whether derivatives other than those of a backward pass may be wanted: of torch.func, or forward-mode AD."""
    return functorch_active() or forward_ad._current_level >= 0


def batched(x: Tensor) -> bool:
    """Whether ``is_grads_batched`` or ``jacobian(vectorize=True)`` made ``x``; torch.func.vmap's is a transform."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def only_reference(tensors: Sequence[Tensor]) -> str | None:
    """The reason why only the reference may compute with these tensors, here and now; None if a kernel may."""
    reason = transformed(tensors)
    if reason:
        return reason
    if torch.compiler.is_compiling():
        in_export = torch.onnx.is_in_onnx_export()
        return "an ONNX graph knows the operators of the reference alone" if in_export else None
    for x in tensors:
        if type(x) not in _PLAIN_TYPES and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"a tensor is a {type(x).__name__}, which computes in its own way (__torch_dispatch__)"
    return "a traced module may run where mova_kernels is not installed" if torch.jit.is_tracing() else None


def readable(op: str, names: Sequence[str], arguments: Sequence[object]) -> Sequence[object]:
    """The arguments of a raw op as kernels take them: in memory, on one device, aligned (by a copy if need be).

    Raises:
        ValueError: a tensor on another device, or without memory; the message names the argument.
    """
    tensors = _tensors(arguments)
    device, aligned = tensors[0].device, True
    for x in tensors:
        start = x.data_ptr()
        if x.device != device:
            on_one_device(op, names, arguments)
        if start < _LOWEST and not has_memory(x, start):
            value = f"a storage of {x.untyped_storage().nbytes()} bytes"
            raise ValueError(f"{op}: {_name(names, arguments, x)} must have memory, got {value}")
        if start % 16 and start % x.element_size():
            aligned = False
    return arguments if aligned else [_aligned(argument) for argument in arguments]


def on_one_device(op: str, names: Sequence[str], arguments: Sequence[object]) -> list[Tensor]:
    """The tensors among the arguments of a raw op.

    Raises:
        ValueError: they are not on one device; the message names the argument.
    """
    tensors = _tensors(arguments)
    device = tensors[0].device
    for x in tensors:
        if x.device != device:
            first, other = (_name(names, arguments, t) for t in (tensors[0], x))
            raise ValueError(f"{op}: {other} must be on {first}'s {device}, got {x.device}")
    return tensors


def resolved(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The same tensors, of which none is lazily negated, and none a zero tensor without memory."""
    return [x if x is None else x.clone() if x._is_zerotensor() else x.resolve_neg() for x in tensors]


def autocast(kind: str) -> bool:
    """Whether autocast is on for tensors on devices of this type."""
    return kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta


def _tensors(arguments: Sequence[object]) -> list[Tensor]:
    tensors = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
        elif isinstance(argument, (list, tuple)):
            tensors += [x for x in argument if isinstance(x, Tensor)]
    return tensors


def _name(names: Sequence[str], arguments: Sequence[object], x: Tensor) -> str:
    for name, argument in zip(names, arguments, strict=False):  # trailing defaults are not among the arguments
        if argument is x:
            return name
        if isinstance(argument, (list, tuple)):
            for i, element in enumerate(argument):
                if element is x:
                    return f"{name}[{i}]"
    raise AssertionError("x is one of the arguments")


def _aligned(argument: object) -> object:
    if isinstance(argument, (list, tuple)):
        return [_aligned(x) for x in argument]
    misplaced = isinstance(argument, Tensor) and argument.data_ptr() % argument.element_size()
    return argument.clone() if misplaced else argument  # type: ignore[attr-defined]


def address(x: Tensor | None) -> int:
    """Where the first number of ``x`` lies; 0 for None."""
    return 0 if x is None else x.data_ptr()
