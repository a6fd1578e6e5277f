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

# Architecture -> the GPU whose shipped configurations are used, and the number of its multiprocessors.
GPUS = {"sm_80": ("NVIDIA-A100-SXM4-80GB", 108), "sm_90": ("NVIDIA-H200", 132), "sm_100": ("NVIDIA-B200", 148)}


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
def emulated_gpu(gpu: str) -> Iterator[None]:
    """The adapter runs as on ``gpu``: the ops run their Triton kernels, with the grids and configurations of that GPU.

    PyTorch computes the other products.
    """
    name, multiprocessors = GPUS[gpu]
    every = ",".join(f"{op}=triton" for op in backends.ops() if "triton" in backends._TABLE[op])
    with (
        compiled_on_cpu_tensors(gpu),
        mock.patch.object(_linear, "_is_ours", lambda *operands: False),
        mock.patch.object(tuning, "device_name", lambda device: name),
        mock.patch.object(persistent, "num_multiprocessors", lambda x: multiprocessors),
        use_backend(every),
    ):
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
