"""The compiled libraries: loading, threads, instruction sets, and calls with one packed argument block.

The CPU library is loaded at import, the CUDA library at its first use. Nothing is ever built here. A library that is
missing is no error until somebody asks for it by name; :func:`cpu_reason` and :func:`cuda_reason` say why it is not
there. The C side is csrc/common/mova_kernels.h.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._plain import address
from .backends import Backend

ABI_VERSION = 6  # MK_ABI_VERSION of csrc/common/mova_kernels.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # mk_dtype

_DIRECTORY = Path(__file__).resolve().parent / "_lib"
_FILES = {"cpu": "libmova_kernels.so", "cuda": "libmova_kernels_cuda.so"}
_BAD_ARG = 1  # MK_BAD_ARG


def build_info() -> dict[str, Any]:
    """What the build wrote down: version, abi, compiler, build_type, cuda, cuda_archs, cuda_why. Empty if not built."""
    path = _DIRECTORY / "build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def cpu_reason() -> str | None:
    """Why the CPU library cannot be used; None if it can."""
    return _cpu if isinstance(_cpu, str) else None


def cpu_declines(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel of the CPU library cannot run on tensors of this device and dtype; None if it can."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    return cpu_reason()


def _not_while_exporting(device: torch.device) -> str | None:
    return "an exported program may run where it is not built" if torch.compiler.is_exporting() else None


def hopper_declines(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel for sm_90a cannot run on tensors of this device and dtype; None if it can."""
    if device.type != "cuda":
        return f"it runs on cuda tensors, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if reason := cuda_reason():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return "it runs on compute capability 9.0 (Hopper), not on {}.{}".format(*capability)
    if not any(arch.startswith("90a") for arch in build_info().get("cuda_archs") or ()):
        return "the compiled cuda library is built without sm_90a (MOVA_CUDA_ARCHS)"
    return None


def never_run(device: torch.device) -> str:
    """Why auto does not take a kernel of the CUDA library."""
    return "it has never run on a GPU (docs/gpu-status.md)"


HOPPER = Backend("cuda", hopper_declines, only_when_asked=never_run)  # of an op in CUDA C++ for sm_90a
BACKEND = Backend("cpu", cpu_declines, only_when_asked=_not_while_exporting)  # of an op in C++ for CPUs


@functools.cache
def cuda_reason() -> str | None:
    """Why the CUDA library cannot be used; None if it can. Loads it, and looks for a driver and a device."""
    library = _cuda()
    if isinstance(library, str):
        return library
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA"
    driver, runtime = library.mk_cuda_driver_version(), library.mk_cuda_runtime_version()
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 < runtime // 1000:  # within a major version CUDA is compatible both ways
        return f"the NVIDIA driver supports CUDA {_dotted(driver)}, the library needs {_dotted(runtime)}"
    devices = ctypes.c_int64()
    if library.mk_cuda_device_count(ctypes.byref(devices)) != 0:
        return _last_error(library)
    return None if devices.value > 0 else "there is no CUDA device"


@functools.cache
def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: "base", "avx2", "avx512" or "avx512_bf16"."""
    return _require("cpu").mk_cpu_isa().decode()


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this processor has."""
    return tuple(_require("cpu").mk_cpu_isas().decode().split(","))


def set_cpu_isa(name: str) -> None:
    """Make the CPU kernels of this process use one instruction set; MOVA_CPU_ISA does so at import.

    Raises:
        ValueError: unknown instruction set.
        RuntimeError: this processor does not have it, or the library is missing.
    """
    library = _require("cpu")
    status = library.mk_set_cpu_isa(name.encode())
    cpu_isa.cache_clear()
    if status:
        _raise(library, status)


def function(name: str, tensors: str, numbers: str, library: str = "cpu") -> Callable[..., None]:
    """A C function ``int name(const void* args, uint64_t nbytes)`` as a Python one with keyword arguments.

    One packed block instead of one ctypes conversion per argument makes a call five times faster. The Python function
    is generated, because matching keywords in the interpreter takes half as long as looking them up in a dict.

    Args:
        name: of the C function.
        tensors: the names of the pointers, with which the C struct begins.
        numbers: the names of the other fields in their order; ``int64_t`` unless one says ``eps:double`` or
            ``stream:uint64``.
        library: "cpu" or "cuda"; looked up at the first call.

    Returns:
        A function of the block's fields: a tensor or None for each pointer, a torch.dtype for ``dtype``. It takes the
        strides itself from the tensors: ``x_stride_sample`` and ``x_stride_token`` are the first two strides of ``x``,
        or 0 for None. It raises TypeError for a missing or unknown field, ValueError for bad arguments, RuntimeError
        for all other failures.
    """
    pointers, layout, values = tensors.split(), "", {}
    for number in numbers.split():
        field, _, kind = number.partition(":")
        layout += {"": "q", "double": "d", "uint64": "Q"}[kind]
        values[field] = "DTYPES[dtype]" if field == "dtype" else field
    lines, strides = [], set[str]()
    for tensor in pointers:
        of_tensor = [field for field in values if field.startswith(f"{tensor}_stride_")]
        if of_tensor:
            count = len(of_tensor)
            lines.append(
                f"{', '.join(of_tensor)}, = {tensor}.stride()[:{count}] if {tensor} is not None else {(0,) * count}"
            )
            strides.update(of_tensor)
    parameters = [*pointers, *(field for field in values if field not in strides)]
    fields = [*(f"address({tensor})" for tensor in pointers), *values.values()]
    lines.append(f"block = _pack('={len(pointers)}Q{layout}', {', '.join(fields)})")
    lines.append(f"_call({name!r}, {library!r}, block, ({', '.join(pointers)},))")
    made: dict[str, Any] = {}
    exec("\n    ".join([f"def {name}(*, {', '.join(parameters)}):", *lines]), globals(), made)
    return made[name]


_pack = struct.pack  # the generated functions call this and _call


def _call(name: str, library: str, block: bytes, tensors: tuple[Tensor | None, ...]) -> None:
    """Calls the C function. The emulator replaces this, since it has to know the tensors behind the addresses."""
    status = _entry(name, library)(block, len(block))
    if status:
        _raise(_require(library), status)


@functools.cache
def _entry(name: str, library: str) -> Callable[[bytes, int], int]:
    entry = getattr(_require(library), name)
    entry.argtypes = (ctypes.c_char_p, ctypes.c_uint64)
    return entry


def empty(like: Tensor, *shape: int) -> Tensor:
    """like.new_empty(shape) for a CPU. What is large lies in huge pages, as in NumPy: fresh memory costs less then."""
    x = like.new_empty(shape)
    if x.nbytes >= 1 << 22:
        _require("cpu").mk_advise_huge_pages(address(x), x.nbytes)
    return x


def adjacent_channels(x: Tensor) -> Tensor:
    """``x``, or a copy whose last dimension has stride 1, which is what the C functions take."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """``x`` (P, L, C), or a copy of it, as TMA and accesses of 16 bytes take it.

    Channels are adjacent, the address and the strides are multiples of 16 bytes, and the memory of a token lies within
    that of its pair.
    """
    pair, token, channel = x.stride()
    _, length, channels = x.shape
    step = 16 // x.element_size()
    nested = token >= channels and pair >= length * token and pair % token == 0
    if channel == 1 and nested and pair % step == 0 and token % step == 0 and address(x) % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def aligned_table(x: Tensor) -> Tensor:
    """``x``, or a copy of it, contiguous and from a multiple of 16 bytes on."""
    return x if x.is_contiguous() and address(x) % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def cuda_stream(device: int) -> int:
    """The cudaStream_t that torch uses on this device."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # private, but 20 times faster than the public way
    return raw(device) if raw is not None else torch.cuda.current_stream(device).cuda_stream


def _load(library: str) -> ctypes.CDLL | str:
    """The library, or why there is none.

    Raises:
        ImportError: it is there, but was built from other sources than this file.
    """
    path = _DIRECTORY / _FILES[library]
    if not path.exists():
        info = build_info()
        why = info.get("native_why") or (info.get("cuda_why") if library == "cuda" else None) or "it was never built"
        return f'the compiled {library} library is missing: {why} (re-run "pip install -e ." to build it)'
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the compiled {library} library does not load: {error}"
    abi = loaded.mk_abi_version()
    if abi != ABI_VERSION:
        raise ImportError(
            f'{path.name} has ABI version {abi}, mova_kernels needs {ABI_VERSION}: re-run "pip install -e ."'
        )
    loaded.mk_last_error.restype = ctypes.c_char_p
    return loaded


@functools.cache
def _cuda() -> ctypes.CDLL | str:
    return _load("cuda")


def _require(library: str) -> ctypes.CDLL:
    loaded = _cpu if library == "cpu" else _cuda()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def _last_error(library: ctypes.CDLL) -> str:
    return library.mk_last_error().decode(errors="replace")


def _raise(library: ctypes.CDLL, status: int) -> NoReturn:
    raise (ValueError if status == _BAD_ARG else RuntimeError)(_last_error(library))


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _torch_parallel_for() -> ctypes.c_void_p | None:
    """libtorch's C function of this name, or None: then the kernels run on the calling thread.

    It shares torch's pool and honours torch.set_num_threads from every thread, which an OpenMP of our own would not.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def _load_cpu() -> ctypes.CDLL | str:
    library = _load("cpu")
    if isinstance(library, ctypes.CDLL):
        library.mk_cpu_isa.restype = library.mk_cpu_isas.restype = ctypes.c_char_p
        library.mk_set_cpu_isa.argtypes = (ctypes.c_char_p,)
        library.mk_set_parallel_for.argtypes = (ctypes.c_void_p,)
        library.mk_set_parallel_for.restype = None
        library.mk_advise_huge_pages.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
        library.mk_advise_huge_pages.restype = None
        library.mk_set_parallel_for(_torch_parallel_for())
    return library


_cpu = _load_cpu()
if not isinstance(_cpu, str) and os.environ.get("MOVA_CPU_ISA"):
    set_cpu_isa(os.environ["MOVA_CPU_ISA"])
