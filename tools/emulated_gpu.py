"""mova_kernels on the emulator (tools/emulator): its kernels for GPUs run compiled, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch
from emulator import cuda, triton_driver

from mova_kernels import _linear, backends, use_backend
from mova_kernels._triton import availability, tuning
from mova_kernels.ops.ragged_linear import triton_impl as persistent

# Architecture -> the GPU whose shipped configurations are used, and the number of its multiprocessors. On sm_90a the
# ops run in CUDA C++ as far as they have it, on the others in Triton.
GPUS = {
    "sm_80": ("NVIDIA-A100-SXM4-80GB", 108),
    "sm_90": ("NVIDIA-H200", 132),
    "sm_90a": ("NVIDIA-H200", 132),
    "sm_100": ("NVIDIA-B200", 148),
}


@contextmanager
def compiled_on_cpu_tensors(gpu: str) -> Iterator[None]:
    """The Triton backend takes CPU tensors of all its dtypes, and its launches go to the emulator of ``gpu``."""
    with ExitStack() as stack:
        for asked in ("_interpreted", "_interpreter_is_on"):  # Both decide whether Triton takes CPU tensors
            stack.enter_context(mock.patch.object(availability, asked, lambda: True))
        stack.enter_context(mock.patch.object(availability, "INTERPRETED_DTYPES", availability.DTYPES))
        triton_driver.use(gpu)
        stack.callback(triton_driver.leave)
        yield


@contextmanager
def cuda_on_cpu_tensors() -> Iterator[cuda.Library]:
    """The CUDA backend takes CPU tensors of the dtypes that it takes on a Hopper GPU, where it is asked for."""

    def as_on_hopper(b: backends.Backend) -> backends.Backend:
        return replace(b, declines=lambda device, dtype: b.declines(torch.device("cuda", 0), dtype))

    with ExitStack() as stack:
        library = stack.enter_context(cuda.library("90a"))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)))
        for table in backends._TABLE.values():
            if "cuda" in table:
                stack.enter_context(mock.patch.dict(table, cuda=as_on_hopper(table["cuda"])))
        yield library


@contextmanager
def emulated_gpu(gpu: str) -> Iterator[None]:
    """The adapter runs as on ``gpu``: the ops run their kernels, with the grids and configurations of that GPU.

    PyTorch computes the other products.
    """
    name, multiprocessors = GPUS[gpu]
    hopper = gpu == "sm_90a"
    kinds = ("cuda", "triton") if hopper else ("triton",)
    taken = {op: next((kind for kind in kinds if kind in table), None) for op, table in backends._TABLE.items()}
    with ExitStack() as stack:
        if hopper:
            stack.enter_context(cuda_on_cpu_tensors())
        stack.enter_context(compiled_on_cpu_tensors(gpu.removesuffix("a")))
        stack.enter_context(mock.patch.object(_linear, "_is_ours", lambda *operands: False))
        stack.enter_context(mock.patch.object(tuning, "device_name", lambda device: name))
        stack.enter_context(mock.patch.object(persistent, "num_multiprocessors", lambda x: multiprocessors))
        stack.enter_context(use_backend(",".join(f"{op}={kind}" for op, kind in taken.items() if kind)))
        yield
