"""tools/dry_run with the emulator in it.

The first tests need no PyTorch with CUDA. Of the others, ``python tools/dry_run -m pytest -p emulated
tests/test_dry_run.py`` runs those that do.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import check_budget

from mova_kernels import use_backend
from mova_kernels.ops import expert_attention, rope2d, rope2d_table

DRY_RUN = Path(__file__).resolve().parents[1] / "tools" / "dry_run"
PTX = """//
.version 8.7
.target sm_90a
.address_size 64
.visible .entry scale(.param .u64 array, .param .f32 factor)
{
.reg .b32 %r<4>; .reg .b64 %d<3>;
ld.param.u64 %d1, [array]; ld.param.f32 %r1, [factor];
mov.u32 %r2, %tid.x; mad.wide.u32 %d2, %r2, 4, %d1;
ld.global.f32 %r3, [%d2]; mul.f32 %r3, %r3, %r1; st.global.f32 [%d2], %r3;
ret;
}
"""


def dry() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_name() == "dry run"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if dry():
        return ctypes.CDLL(None)
    triton = pytest.importorskip("triton")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    version = re.search(r"define CUDART_VERSION\s+(\d+)", (headers / "cuda_runtime_api.h").read_text())
    if version is None or int(version[1]) < 13000:
        pytest.skip("driver.cpp wants headers of CUDA 13")
    library = tmp_path_factory.mktemp("dry_run") / "driver.so"
    command = [
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-w",
        "-isystem",
        headers,
        DRY_RUN / "driver.cpp",
        "-o",
        library,
    ]
    subprocess.run([*command, "-ldl"], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def launch(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[float]]]:
    """Launch ``scale`` with some image of its module; returns the status, and what is in memory then."""
    monkeypatch.syspath_prepend(DRY_RUN)
    import emulated

    def run(image: bytes, threads: int, connected: bool = True) -> tuple[int, list[float]]:
        pointer, module, function = (ctypes.c_void_p() for _ in range(3))
        driver.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(16))
        array = (ctypes.c_float * 4)(1, 2, 3, 4)
        driver.cudaMemcpy(pointer, array, ctypes.c_size_t(16), 1)
        driver.cuModuleLoadData(ctypes.byref(module), image)
        driver.cuModuleGetFunction(ctypes.byref(function), module, b"scale")
        factor = ctypes.c_float(3)
        arguments = (ctypes.c_void_p * 2)(ctypes.addressof(pointer), ctypes.addressof(factor))
        emulated.connect(driver) if connected else driver.dry_run_emulate(None)
        status = driver.cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, 0, None, arguments, None)
        driver.cudaMemcpy(array, pointer, ctypes.c_size_t(16), 2)
        driver.cudaFree(pointer)
        emulated.connect(driver)
        return status, list(array)

    return run


def test_kernel_in_ptx_computes(launch) -> None:
    assert launch(PTX.encode(), 3) == (0, [3, 6, 9, 4])


def test_kernel_does_nothing_without_the_emulator_or_as_machine_code(launch) -> None:
    assert launch(PTX.encode(), 3, connected=False) == (0, [1, 2, 3, 4])
    assert launch(b"\x7fELF" + PTX.encode(), 3) == (0, [1, 2, 3, 4])


def test_fault_is_an_error_of_the_launch(launch, capfd) -> None:
    status, _ = launch(PTX.encode(), 5)
    assert status != 0
    assert "global read of 4 bytes at" in capfd.readouterr().err


def test_captured_kernel_does_not_run(launch, driver) -> None:
    """As on a GPU. Its graph does not run either, which is not as on a GPU."""
    graph = ctypes.c_void_p()
    driver.cudaThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(2)))  # relaxed: memory may be made and copied
    driver.cudaStreamBeginCapture(ctypes.c_void_p(16), 2)
    try:
        assert launch(PTX.encode(), 3) == (0, [1, 2, 3, 4])
    finally:
        driver.cudaStreamEndCapture(ctypes.c_void_p(16), ctypes.byref(graph))


# ---- in the dry run
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    tables = (table.to(q.device) for table in rope2d_table(10, 64))
    return expert_attention(q, k, v, *tables, 2)


def rotation(x: torch.Tensor) -> torch.Tensor:
    tables = (table.to(x.device) for table in rope2d_table(10, 64))
    return rope2d(x, *tables)


only_dry = pytest.mark.skipif(not dry(), reason="this is not the dry run")


@only_dry
def test_tensors_end_where_they_end(driver) -> None:
    tensor, factor = torch.ones(100).cuda(), ctypes.c_float(3)
    module, function, pointer = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(tensor.data_ptr())
    driver.cuModuleLoadData(ctypes.byref(module), PTX.encode())
    driver.cuModuleGetFunction(ctypes.byref(function), module, b"scale")
    arguments = (ctypes.c_void_p * 2)(ctypes.addressof(pointer), ctypes.addressof(factor))
    status = [
        driver.cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, 0, None, arguments, None) for threads in (100, 101)
    ]
    assert status[0] == 0 != status[1]


@only_dry
def test_pytorchs_own_operations_compute() -> None:
    """With kernels of their own, in place, into another tensor, into one that grows, on views, and backward."""

    def compute(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        w = w.clone().requires_grad_()
        y = (x[1:].T @ w).softmax(-1)
        y.square().sum().backward()
        z = x.clone()
        z[:, 1:3].mul_(2)
        grown = torch.empty(0, device=x.device)
        torch.add(z, 1, out=grown)
        torch.cumsum(x, 1, out=z[:, :])
        return [
            y,
            w.grad,
            z,
            grown,
            x.half().float(),
            x.sort().indices,
            x.index_select(0, torch.tensor([2, 0]).to(x.device)),
        ]

    inputs = torch.randn(4, 5), torch.randn(3, 6)
    found, wanted = compute(*(t.cuda() for t in inputs)), compute(*inputs)
    assert all(t.is_cuda for t in found)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.cpu(), w)


@only_dry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "shape", "count"), [(rotation, (2, 100, 2, 64), 1), (attention, (2, 100, 128), 3)])
def test_triton_kernels_and_their_gradients_in_the_dry_run(op, shape, count, dtype) -> None:
    inputs = [torch.randn(shape).to(dtype) for _ in range(count)]

    def found(working: torch.dtype, device: str) -> list[torch.Tensor]:
        leaves = [x.to(working).to(device).requires_grad_() for x in inputs]
        y = op(*leaves)
        return [y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y, leaves, cotangent.to(working).to(device)))]

    cotangent = torch.randn(shape).to(dtype)
    with use_backend("triton"):
        actual = found(dtype, "cuda")
    with use_backend("reference"):
        truth, plain = found(torch.float64, "cpu"), found(dtype, "cpu")
    for k, values in enumerate(zip(actual, truth, plain, strict=True)):
        check_budget(f"{op.__name__} {k}", *values)
