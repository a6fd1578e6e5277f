"""In the dry run, "cuda" tensors get right numbers: ``import emulated; emulated.use()``, or ``pytest -p emulated``.

Triton's kernels run on tools/emulator, with its checks, launched by Triton's own launcher. A kernel may access the
memory of tensors and nothing else, because PyTorch's cache of memory is off. PyTorch's own operations run on the host
(on_host.py). Captured graphs, kernels of CUDA C++ and fused attention still do nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import on_host
from emulator import Kernel, Memory
from emulator.machine import BUILD

_EMULATOR = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_size_t),
    ctypes.c_size_t,
)
_kernel = functools.cache(Kernel)


@_EMULATOR
def _launch(ptx: bytes, name: bytes, sizes: Any, arguments: Any, memory: Any, allocations: int) -> int:
    try:
        kernel = _kernel(ptx.decode(), name.decode())
        packed = bytearray(kernel.ptx.parameter_bytes)
        for place, (offset, size) in zip(arguments, kernel.parameters.values(), strict=False):  # a pointer has no end
            packed[offset : offset + size] = ctypes.string_at(place, size)
        regions = [Memory(memory[2 * k], memory[2 * k + 1]) for k in range(allocations)]
        kernel.launch(sizes[0:3], sizes[3:6], sizes[6], bytes(packed), regions)
    except Exception:  # it cannot pass through C
        traceback.print_exc()
        return 1
    return 0


def connect(driver: ctypes.CDLL) -> None:
    """From now on, execute the kernels that this library of driver.cpp gets as PTX."""
    driver.dry_run_emulate(_launch)


def use() -> None:
    """Turn this on, in a process of the dry run, before anything is allocated or compiled."""
    from triton.backends.nvidia.compiler import CUDABackend

    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    # Triton gets PTX instead of machine code, which must not come into the usual cache.
    os.environ["TRITON_CACHE_DIR"] = str(BUILD / "triton-ptx")
    CUDABackend.make_cubin = lambda self, ptx, *arguments, **options: ptx.encode()
    connect(ctypes.CDLL(None))
    on_host.use()


def pytest_configure() -> None:
    use()
