"""Triton's own code, which is right on hardware, is right on the emulator, and has no race there.

The kernels are plain ones, so that a fault is the emulator's. ``python tests/test_emulator_calibration.py sm_90`` runs
many more of the same kind.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from emulator import SETTINGS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
triton_driver = pytest.importorskip("emulator.triton_driver")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted", allow_module_level=True)

VERSION = tuple(int(n) for n in triton.__version__.split(".")[:2])
M, N, K = 152, 136, 104  # no multiples of the larger tiles; rows of 16 bytes, as tensor maps demand
MATRIX_UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


class Case(NamedTuple):
    kind: str  # a dtype, or what fp32 is multiplied in
    tile: tuple[int, int, int]
    warps: int = 4
    stages: int = 3
    transposed: str = ""  # "a", "b", "ab"
    narrow: bool = False  # the result has the dtype of the operands

    def __str__(self) -> str:
        tile = "x".join(map(str, self.tile))
        return f"{self.kind} {tile} {self.warps} warps {self.stages} stages {self.transposed}{' narrow' * self.narrow}"

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.kind, torch.float32)


@triton.jit
def matmul(
    a, b, c, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        row, column = start + k[None, :], start + k[:, None]
        x = tl.load(a + m * stride_am + row * stride_ak, mask=(m < M) & (row < K), other=0.0)
        y = tl.load(b + column * stride_bk + n * stride_bn, mask=(column < K) & (n < N), other=0.0)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
    tl.store(c + m * N + n, sums.to(c.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def matmul_of_descriptors(
    a, b, c, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, SPECIALIZED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    if A_TRANSPOSED:
        a_map = tl.make_tensor_descriptor(a, [K, M], [M, 1], [BK, BM])
    else:
        a_map = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    if B_TRANSPOSED:
        b_map = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    else:
        b_map = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BK, BN])
    c_map = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN])
    sums = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=SPECIALIZED, num_stages=STAGES):
        x = a_map.load([k, m]).T if A_TRANSPOSED else a_map.load([m, k])
        y = b_map.load([n, k]).T if B_TRANSPOSED else b_map.load([k, n])
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
    c_map.store([m, n], sums.to(c.dtype.element_ty))


def allocate(size: int, align: int, stream: int) -> torch.Tensor:
    """Where Triton's kernels put their tensor maps."""
    memory = torch.empty(size + align, dtype=torch.uint8)
    return memory[-memory.data_ptr() % align :][:size]


def operands(case: Case, n: int = N, k: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def matrix(rows: int, columns: int, transposed: bool) -> torch.Tensor:
        stored = torch.randn((columns, rows) if transposed else (rows, columns)).to(case.dtype)
        return stored.T if transposed else stored

    c = torch.full((M, n), float("nan"), dtype=case.dtype if case.narrow else torch.float32)
    return matrix(M, k, "a" in case.transposed), matrix(k, n, "b" in case.transposed), c


def check(case: Case, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    """Every element differs from the truth by no more than rounding can explain."""
    a, b = a.double(), b.double()
    truth, sizes = a @ b, a.abs() @ b.abs()
    # Each sum is rounded, and in TF32 the 13 low bits of each operand are lost, in its split form those of the rest.
    lost = {"tf32": 2 * 2.0**-10, "tf32x3": 4 * 2.0**-20}.get(case.kind, 0.0)
    sums = 3 if case.kind == "tf32x3" else 1
    bound = (sums * (a.shape[1] + 1) * 2.0**-24 + lost) * sizes
    if case.narrow:
        bound += torch.finfo(case.dtype).eps / 2 * truth.abs() + torch.finfo(case.dtype).smallest_normal
    excess = (c.double() - truth).abs() - bound
    assert (excess <= 0).all(), f"{case}: off by {(c.double() - truth).abs().max()}"


def precision(case: Case) -> str:
    return case.kind if case.dtype == torch.float32 else "tf32"


def run(case: Case) -> str:
    """The PTX that has run."""
    a, b, c = operands(case)
    grid = (triton.cdiv(M, case.tile[0]), triton.cdiv(N, case.tile[1]))
    launch = {"num_warps": case.warps, "num_stages": case.stages}
    kernel = matmul[grid](a, b, c, M, N, K, *a.stride(), *b.stride(), *case.tile, precision(case), **launch)
    check(case, a, b, c)
    return kernel.asm["ptx"]


def run_descriptors(case: Case, specialized: bool = False) -> str:
    a, b, c = operands(case)
    m, n, _ = case.tile
    transposed = "a" in case.transposed, "b" in case.transposed
    grid = (triton.cdiv(M, m), triton.cdiv(N, n))
    options = (*case.tile, precision(case), *transposed, specialized, case.stages)
    launch = {"num_warps": case.warps, "num_stages": case.stages}
    bases = [x if x.is_contiguous() else x.T for x in (a, b, c)]
    kernel = matmul_of_descriptors[grid](*bases, M, N, K, *options, **launch)
    check(case, a, b, c)
    return kernel.asm["ptx"]


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    if VERSION < (3, 7) and request.param != "sm_80":
        pytest.skip("Triton 3.6 omits fences from pipelined loops (triton-lang/triton#9610): its code is not right")
    triton_driver.use(request.param)
    triton.set_allocator(allocate)
    yield request.param
    SETTINGS.schedule = 0
    triton_driver.leave()


MATMULS = [
    Case("bf16", (64, 64, 32)),
    Case("bf16", (128, 128, 32), warps=8, transposed="a"),
    Case("bf16", (64, 256, 32), stages=1, transposed="b"),
    Case("bf16", (32, 32, 32), transposed="ab", narrow=True),
    Case("fp16", (128, 64, 64), transposed="b", narrow=True),
    Case("fp16", (64, 16, 16), stages=2),
    Case("tf32", (64, 64, 32), transposed="b"),
    Case("tf32", (128, 32, 16), warps=8, stages=1, transposed="a"),
    Case("tf32x3", (64, 32, 32), stages=2),
    Case("ieee", (32, 64, 16), transposed="ab"),
]


each_gpu = pytest.mark.parametrize("gpu", MATRIX_UNITS, indirect=True)
each_gpu_with_tensor_maps = pytest.mark.parametrize("gpu", ["sm_90", "sm_100"], indirect=True)


@each_gpu
@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_matmul(case, gpu) -> None:
    ptx = run(case)
    unit = None if case.kind == "ieee" else MATRIX_UNITS[gpu] if case.tile[0] >= 64 else "mma.sync"
    assert [name for name in MATRIX_UNITS.values() if name in ptx] == [unit] * (unit is not None)


DESCRIPTORS = [
    Case("bf16", (128, 64, 32), transposed="b"),
    Case("bf16", (64, 128, 64), stages=2, narrow=True),
    Case("fp16", (64, 64, 16), warps=8, stages=1, transposed="a"),
    Case("tf32", (64, 32, 32), transposed="b"),
]


@each_gpu_with_tensor_maps
@pytest.mark.parametrize("case", DESCRIPTORS, ids=str)
def test_matmul_of_tensor_descriptors(case, gpu) -> None:
    ptx = run_descriptors(case)
    assert "cp.async.bulk.tensor.2d.shared" in ptx
    assert "cp.async.bulk.tensor.2d.global" in ptx


SPECIALIZED = [
    Case("bf16", (128, 64, 32), transposed="b"),
    Case("fp16", (128, 128, 64), stages=2, narrow=True),
]


@each_gpu_with_tensor_maps
@pytest.mark.parametrize("case", SPECIALIZED, ids=str)
def test_matmul_of_specialized_warps(case, gpu) -> None:
    for schedule in (0, 1, 7):
        SETTINGS.schedule = schedule
        assert "setmaxnreg" in run_descriptors(case, specialized=True)


def sweep(gpu: str) -> None:
    """Many combinations; prints those that fail."""
    tiles = [(64, 64, 32), (128, 128, 32), (64, 32, 64), (128, 64, 64), (64, 16, 16), (64, 256, 32), (32, 32, 32)]
    kinds, flips = ("bf16", "fp16", "tf32", "tf32x3", "ieee"), ("", "ab")
    triton_driver.use(gpu)
    triton.set_allocator(allocate)
    counts, failed = {}, 0
    for kind, tile, warps, stages, flip in itertools.product(kinds, tiles, (4, 8), (1, 3), flips):
        case = Case(kind, tile, warps, stages, flip)
        if case.dtype == torch.float32 and (tile[1] == 256 or (kind != "tf32" and tile != (64, 32, 64))):
            continue
        calls = {"pointers": lambda case=case: run(case)}
        if gpu != "sm_80":
            calls["descriptors"] = lambda case=case: run_descriptors(case)
        if (
            gpu != "sm_80" and stages > 1 and tile[0] >= 128
        ):  # with 64 rows, Triton has two groups of warps compute the same ones
            calls["specialized"] = lambda case=case: run_descriptors(case, specialized=True)
        for name, call in calls.items():
            counts[name] = counts.get(name, 0) + 1
            try:
                call()
            except Exception as error:  # a refusal, a race or a wrong number: all are what this looks for
                failed += 1
                print(f"{gpu} {name} {case}: {type(error).__name__}: {str(error)[:500]}", flush=True)
    print(f"{gpu}, Triton {triton.__version__}: {counts}, {failed} failed")


if __name__ == "__main__":
    sweep(sys.argv[1])
