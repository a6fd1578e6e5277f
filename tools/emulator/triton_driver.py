"""A Triton driver whose GPU is the emulator: after ``use("sm_90")``, ``kernel[grid](...)`` runs on CPU tensors.

The kernels are compiled as for a GPU, but for the last step from PTX to machine code, which the emulator does not need.
Works with Triton 3.6 and later.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import _allocation
from triton.runtime.cache import get_cache_manager

from .machine import BUILD, Kernel, Launch, Memory
from .memory import memory_of

_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
_kernels: dict[str, Kernel] = {}  # by the hash of what was compiled
_before: dict[str, Any] = {}  # what use() replaced


def use(architecture: str) -> None:
    """Make Triton compile for "sm_80", "sm_90" or "sm_100", and run the kernels here, until :func:`leave`."""
    leave()
    _before.update(make_cubin=CUDABackend.make_cubin, cache=os.environ.get("TRITON_CACHE_DIR"))
    _before.update(driver=getattr(triton.runtime.driver, "_active", None))  # None: none was asked for yet
    # What is compiled without machine code must not come into the usual cache.
    os.environ["TRITON_CACHE_DIR"] = str(BUILD / "triton")
    CUDABackend.make_cubin = lambda self, *arguments, **options: b"none"
    triton.runtime.driver.set_active(_Driver(int(architecture.removeprefix("sm_"))))


def leave() -> None:
    """Undo :func:`use`."""
    if not _before:
        return
    CUDABackend.make_cubin = _before["make_cubin"]
    if _before["cache"] is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = _before["cache"]
    triton.runtime.driver.set_active(_before["driver"])
    _before.clear()


class _Launcher:
    """What Triton calls in the place of the function that it would compile for each kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = list(source.signature.values())
        self.metadata = metadata
        self.source = source.fn.__module__
        if metadata.hash not in _kernels:
            path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
            with open(path) as file:
                _kernels[metadata.hash] = Kernel(file.read())
        self.kernel = _kernels[metadata.hash]

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
        kernel, tensors = self.kernel, []
        parameters = bytearray(kernel.ptx.parameter_bytes)
        values: list[tuple[str, Any]] = []
        for kind, argument in _flat(self.signature, arguments):
            if not kind.startswith("*"):
                values.append((_FORMATS[kind], argument))
            elif isinstance(argument, torch.Tensor):
                tensors.append(argument)
                values.append(("Q", argument.data_ptr()))
            else:
                values.append(("Q", argument or 0))
        places = [offset for offset, _ in kernel.parameters.values()]
        memory = memory_of(tensors)
        # The last two parameters are Triton's scratch memory: of all kernels, and of those that are profiled.
        if size := self.metadata.global_scratch_size * x * y * z:
            scratch = _allocation._allocator.get()(size, self.metadata.global_scratch_align, stream)  # set_allocator
            low = scratch.data_ptr()
            memory.append(Memory(low, low + size))
            values.append(("Q", low))
        values += [("Q", 0)] * (len(places) - len(values))
        for place, (code, value) in zip(places, values, strict=True):
            struct.pack_into("<" + code, parameters, place, value)
        m = self.metadata
        launch = Launch(m.name, self.source, kernel, (x, y, z), (32 * m.num_warps, 1, 1), m.shared)
        launch.run(bytes(parameters), memory)


def _flat(signature: Iterable[Any], arguments: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The kinds and values of all arguments, also of those in tuples, but for constants."""
    for kind, argument in zip(signature, arguments, strict=True):
        if isinstance(kind, (tuple, list)):
            yield from _flat(kind, argument)
        elif kind != "constexpr":
            yield kind, argument


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), 1, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = _Utils()

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu
