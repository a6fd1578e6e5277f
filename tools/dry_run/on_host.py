"""In the dry run, PyTorch's own operations on "cuda" tensors run on the host: :func:`use`, which emulated.py calls.

The memory of the dry run is the host's, so every "cuda" tensor has a CPU tensor with the same elements.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# These work without a kernel: memory, views of it, and streams.
KEPT = {
    "_local_scalar_dense", "_pin_memory", "_reshape_alias", "as_strided", "empty", "empty_strided", "is_pinned",
    "is_set_to", "record_stream", "resize_", "set_", "unfold", "view", "view_as_complex", "view_as_real",
}  # fmt: skip
_library: list[torch.library.Library] = []  # its registrations last as long as it does


def use() -> None:
    for fused in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_mem_efficient_sdp):
        fused(False)  # a CPU has other operations for these
    library = torch.library.Library("aten", "IMPL")
    _library.append(library)
    names = [*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::copy_"]
    for name in names:
        space, _, operation = name.partition("::")
        base, _, overload = operation.partition(".")
        if space == "aten" and base not in KEPT:
            function = getattr(getattr(torch.ops.aten, base), overload or "default")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it replaces what is there
                library.impl(operation, _by_host(function), "CUDA", allow_override=True)


def _by_host(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        given: list[tuple[Tensor, Tensor]] = []  # tensors of the host, and the tensors that they represent

        def to_host(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_cuda:
                given.append((_host(x), x))
                return given[-1][0]
            if isinstance(x, torch.Generator):
                return None
            return torch.device("cpu") if isinstance(x, torch.device) else x

        def to_device(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            for twin, original in given:
                if x is twin:
                    if x.shape != original.shape:  # an empty tensor for the result
                        _host(original.resize_(x.shape)).copy_(x)
                    return original
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            _host(made).copy_(x)
            return made

        return tree_map(to_device, function(*tree_map(to_host, arguments), **tree_map(to_host, options)))

    return run


def _host(x: Tensor) -> Tensor:
    storage = x.untyped_storage()
    if storage.nbytes() < x.element_size():
        return torch.empty(x.shape, dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    twin = torch.frombuffer(memory, dtype=x.dtype, count=storage.nbytes() // x.element_size())
    return twin.as_strided(x.shape, x.stride(), x.storage_offset())
