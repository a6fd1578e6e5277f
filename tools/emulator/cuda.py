"""The library's CUDA C++ on the emulator, through its own C functions: checks, argument blocks and launches included.

    with emulator.cuda.library("90a") as library:
        y = cuda_impl.forward(x, rows, in_size, out_size)  # CPU tensors
    print(library.launches)

nvcc compiles the sources as always; they are linked with cuda_runtime.cpp instead of libcudart. It turns each launch
into a call of :meth:`Library._launch`, which runs the kernel's PTX on the memory of the call's tensors. A file of
kernels for a single architecture has that in its name, like linear_sm90a.cu.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from mova_kernels import _compiled

from .machine import BUILD, Fault, Kernel, Launch, Memory, run
from .memory import memory_of
from .ptx import entries

ROOT = Path(__file__).resolve().parents[2]
NATIVE = Path(__file__).with_name("native")
RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
STREAM = 0x57EA00  # work on any other stream is an error of the launcher
CPU = -1  # the ordinal that CPU tensors have

COMPILE = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-DMK_HAS_SM90A",
    "-lineinfo",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]  # as CMakeLists.txt
LINK = ["-shared", "-cudart", "none", f"-Xlinker=--version-script={ROOT / 'csrc' / 'exports.map'},-z,now,-z,defs"]

LAUNCH_FAILURE, NO_KERNEL_IMAGE = 719, 209  # cudaError_t


class Device(NamedTuple):
    """What cudaDeviceGetAttribute says."""

    major: int
    minor: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


KIB = 1024
DEVICES = {
    "80": Device(8, 0, 108, 163 * KIB, 164 * KIB),
    "90a": Device(9, 0, 132, 227 * KIB, 228 * KIB),
    "100": Device(10, 0, 148, 227 * KIB, 228 * KIB),
}


# ---- Building ----


def reason() -> str | None:
    """Why there is no emulated library; None if there is."""
    missing = [name for name, path in (("nvcc", nvcc()), ("g++", shutil.which("g++"))) if path is None]
    return f"{' and '.join(missing)} not found" if missing else None


def sources() -> list[Path]:
    """The sources of libmova_kernels_cuda.so: those that CMakeLists.txt lists."""
    section = re.search(
        r"^# ---- CUDA ----$(.*?)^# ----", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL | re.MULTILINE
    )
    assert section is not None
    return [ROOT / path for path in re.findall(r"\bcsrc/[\w/]+\.(?:cu|cpp)\b", section[1])]


def build(sources: Sequence[Path], architecture: str, headers: Path = ROOT / "csrc") -> Path:
    """A folder with library.so and a .ptx per CUDA source; from the cache if nothing changed since.

    Args:
        sources: in CUDA C++ and C++; csrc/common/host.cpp is one of them.
        architecture: a key of DEVICES.
        headers: the folder to which #include is relative.
    """
    path = nvcc()
    assert path is not None, reason()
    content = hashlib.sha256()
    versions = [subprocess.run([c, "--version"], capture_output=True, check=True).stdout for c in (path, "g++")]
    files = [*sources, RUNTIME, NATIVE / "tensor_map.h", *sorted(p for p in headers.rglob("*") if p.is_file())]
    names = " ".join([architecture, *(p.name for p in files)])
    for part in (names.encode(), *versions, Path(__file__).read_bytes(), *(p.read_bytes() for p in files)):
        content.update(hashlib.sha256(part).digest())
    folder = BUILD / f"cuda-{architecture}-{content.hexdigest()[:20]}"
    if folder.exists():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        objects = [_compile(path, source, architecture, headers, made, Path(scratch)) for source in (*sources, RUNTIME)]
        run(path, *LINK, "-o", str(made / "library.so"), *objects)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _compile(path: str, source: Path, architecture: str, headers: Path, made: Path, scratch: Path) -> str:
    """The object of one source. Its PTX comes from the same run, since names of kernels contain a hash of the run."""
    kept = Path(tempfile.mkdtemp(dir=scratch))
    output = kept / "compiled.o"
    only = re.search(r"_sm(\d+a)$", source.stem)
    target = f"compute_{only[1] if only else architecture}"
    command = [
        path,
        *COMPILE,
        f"-I{headers}",
        "-gencode",
        f"arch={target},code={target}",
        "-keep",
        "-keep-dir",
        str(kept),
    ]
    run(*command, "-c", "-o", str(output), str(source))
    for ptx in kept.glob("*.ptx"):
        ptx.rename(made / f"{source.parent.name}-{ptx.name}")
    return str(output)


def nvcc() -> str | None:
    """The path of the compiler, or None."""
    candidates = (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next(filter(None, (shutil.which(candidate) for candidate in candidates if candidate)), None)


# ---- Running ----

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
_STATIC_SHARED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64))
_CHECK_RANGE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64)
_REFUSE = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class _Connection(ctypes.Structure):
    """mk_emulator of cuda_runtime.cpp."""

    _fields_ = (
        ("launch", _LAUNCH),
        ("static_shared", _STATIC_SHARED),
        ("check_range", _CHECK_RANGE),
        ("refuse", _REFUSE),
        ("stream", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("device", *Device._fields)),
    )


class Library:
    """A library that :func:`build` made, connected to a device.

    Attributes:
        device: decides which kernels have an image; the runtime was told at the beginning.
        launches: what was launched since the list was last cleared.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        self.launches: list[Launch] = []
        self.loaded = ctypes.CDLL(str(folder / "library.so"))
        self.device = device
        self._memory: list[Memory] = []
        self._error: BaseException | None = None
        self._images: dict[str, str] = {}
        self._sources: dict[str, str] = {}
        for path in sorted(folder.glob("*.ptx")):
            text = path.read_text()
            for name in entries(text):
                if name in self._images:
                    raise ValueError(f"two sources have a kernel {name}")
                self._images[name], self._sources[name] = text, f"{path.stem.replace('-', '/', 1)}.cu"
        self._kernel = functools.cache(self._decode)
        self._callbacks = (
            _LAUNCH(self._guarded(self._launch)),
            _STATIC_SHARED(self._guarded(self._static_shared)),
            _CHECK_RANGE(self._guarded(self._check_range)),
            _REFUSE(self._guarded(self._refuse)),
        )
        self.tell(device)
        self.loaded.mk_last_error.restype = self.loaded.mk_emulator_unread_error.restype = ctypes.c_char_p

    def tell(self, device: Device) -> None:
        """Tell the runtime what its device is."""
        self.loaded.mk_emulator_connect(ctypes.byref(_Connection(*self._callbacks, STREAM, CPU, *device)))

    def call(self, name: str, block: bytes, tensors: Sequence[torch.Tensor]) -> None:
        """Call ``int name(const void* block, uint64_t nbytes)``; its kernels may access these tensors, nothing else.

        Raises:
            Fault: a kernel did something wrong, or the launcher asked for what is not emulated.
            ValueError, RuntimeError: the function's own errors.
        """
        function = getattr(self.loaded, name)
        self._memory = memory_of(tensors)
        self._error = None
        self.loaded.mk_emulator_unread_error()
        try:
            status = function(ctypes.c_char_p(block), ctypes.c_uint64(len(block)))
        finally:
            self._memory = []
        if self._error is not None:  # the function knows no more than that a launch failed
            raise self._error
        if status:
            _compiled._raise(self.loaded, status)
        unread = self.loaded.mk_emulator_unread_error().decode()
        if unread != "cudaSuccess":
            raise Fault(f"{name} succeeded, but left {unread} unread")

    def _guarded(self, function: Callable[..., int | None]) -> Callable[..., int]:
        """A callback must not raise: the first error waits for :meth:`call`, and the launch fails."""

        def callback(*arguments: Any) -> int:
            try:
                return function(*arguments) or 0
            except BaseException as error:
                self._error = self._error or error
                return LAUNCH_FAILURE

        return callback

    def _decode(self, name: str) -> Kernel:
        return Kernel(self._images[name], name)

    def _launch(self, name: bytes, grid, block, shared_bytes: int, arguments) -> int:
        """The kernel has an image, since cuda_runtime.cpp has asked for its static shared memory before."""
        kernel = self._kernel(name.decode())
        parameters = bytearray(kernel.ptx.parameter_bytes)
        for i, (offset, size) in enumerate(kernel.parameters.values()):
            parameters[offset : offset + size] = ctypes.string_at(arguments[i], size)
        launch = Launch(
            name.decode(), self._sources[name.decode()], kernel, tuple(grid[:3]), tuple(block[:3]), shared_bytes
        )
        bound, threads = self._launch_bound(launch.name), math.prod(launch.block)
        if threads > bound:
            raise Fault(f"{launch.name} has {threads} threads in a block, its launch bound is {bound}")
        self.launches.append(launch)
        launch.run(bytes(parameters), self._memory)
        return 0

    def _launch_bound(self, name: str) -> int:
        """The most threads of a block, as __launch_bounds__ says."""
        found = re.search(rf"\.entry\s+{re.escape(name)}\([^{{]*\.maxntid\s+(\d+)", self._images[name])
        return int(found[1]) if found else 1024

    def _has_image(self, name: str) -> bool:
        """Whether the kernel runs on this device: one for sm_90a does so on no other."""
        target = re.search(r"^\.target sm_(\d+)(a?)", self._images[name], re.MULTILINE)
        assert target is not None
        here = 10 * self.device.major + self.device.minor
        return int(target[1]) == here if target[2] else int(target[1]) <= here

    def _static_shared(self, name: bytes, found) -> int:
        if not self._has_image(name.decode()):
            return NO_KERNEL_IMAGE
        found[0] = self._kernel(name.decode()).ptx.shared_bytes
        return 0

    def _check_range(self, begin: int | None, size: int) -> int:
        begin = begin or 0
        if size == 0 or any(m.low <= begin and begin + size <= m.high for m in self._memory):
            return 0
        raise Fault(f"the {size} bytes from {begin:#x} on are outside of all tensors")

    def _refuse(self, why: bytes) -> None:
        raise Fault(why.decode(errors="replace"))


@contextmanager
def library(architecture: str, *, multiprocessors: int | None = None) -> Iterator[Library]:
    """Makes the functions of the CUDA library run on the emulator, with CPU tensors.

    Args:
        architecture: "80", "90a" or "100".
        multiprocessors: instead of those that the device has.

    Yields:
        The library, whose launches of before are forgotten.
    """
    emulated = _library(architecture)
    emulated.launches.clear()
    emulated.tell(emulated.device._replace(multiprocessors=multiprocessors or emulated.device.multiprocessors))
    call = _compiled._call

    def emulated_call(name: str, library: str, block: bytes, tensors: tuple[torch.Tensor | None, ...]) -> None:
        if library == "cuda":
            emulated.call(name, block, [x for x in tensors if x is not None])
        else:
            call(name, library, block, tensors)

    with mock.patch.multiple(
        _compiled,
        _call=emulated_call,
        _cuda=lambda: emulated.loaded,
        cuda_reason=lambda: None,
        cuda_stream=lambda device: STREAM,
    ):
        yield emulated


@functools.cache
def _library(architecture: str) -> Library:
    emulated = Library(build(sources(), architecture), DEVICES[architecture])
    if emulated.loaded.mk_abi_version() != _compiled.ABI_VERSION:
        raise ImportError("csrc and mova_kernels have different ABI versions")
    return emulated
