"""Registration of the raw ops: one torch.library namespace, schema + kernel + fake, no autograd.

Differentiation is not registered here. The public function of an op picks an ``autograd.Function`` instead, because
AOTAutograd's on-disk cache keys a custom op by its name: a registered backward that changed between two releases would
be served stale (pytorch/pytorch#144344), while a Function is traced into the graph and hence into the key. For the
same reason an op whose meaning or fake changes gets a new name, once the old one was in a release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _flops, _plain

NAMESPACE = "mova_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define ``mova_kernels::name`` with a kernel for every device and a fake; returns the op, ready to be called.

    ``flops`` counts the matrix products of a call, from its arguments (:mod:`mova_kernels._flops`); None: it has none.

    The kernel gets tensors that :mod:`mova_kernels._plain` has checked. PyTorch also calls the fake as soon as one
    tensor is on the meta device. The fake's result is unwritten memory, so then all tensors must be on that device.
    """
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = [argument.name for argument in op._schema.arguments]
    gaps = [i for i, argument in enumerate(op._schema.arguments) if str(argument.type) == "List[Optional[Tensor]]"]

    def on_device(*arguments: Any) -> Any:
        if gaps:  # PyTorch resolves lazy negation in every other kind of argument itself
            arguments = tuple(_plain.resolved(x) if i in gaps else x for i, x in enumerate(arguments))
        return kernel(*_plain.readable(name, names, arguments))

    def without_values(*arguments: Any) -> Any:
        _plain.on_one_device(name, names, arguments)
        return fake(*arguments)

    _LIBRARY.impl(name, on_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", without_values, lib=_LIBRARY)
    if flops is not None:
        _flops.register(op, flops)
    return op
