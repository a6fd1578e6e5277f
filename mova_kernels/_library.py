"""Registration of the raw ops: one torch.library namespace, schema + kernel + fake, no autograd.

Differentiation is not registered here. The public function of an op picks an ``autograd.Function`` instead, because
AOTAutograd's on-disk cache keys a custom op by its name: a registered backward that changed between two releases would
be served stale (pytorch/pytorch#144344), while a Function is traced into the graph and hence into the key. For the
same reason an op whose meaning or fake changes gets a new name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "mova_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``mova_kernels::name`` with a kernel for every device and a fake; returns the op, ready to be called."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def functorch_active() -> bool:
    """Whether torch.func transforms are on: they need the (slower) ``setup_context`` form of autograd.Function."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active()) if active is not None else False
