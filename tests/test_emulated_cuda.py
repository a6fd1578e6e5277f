"""The CUDA library on the emulator: its C functions as they are, and kernels as nvcc compiles them."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator

import pytest
import torch
from emulator import cuda
from helpers import check_budget
from torch import Tensor

from mova_kernels import _compiled
from mova_kernels.ops.feature_resample import cuda_impl, reference

if cuda.reason():
    pytest.skip(f"nothing to emulate with: {cuda.reason()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}  # as in names of kernels
SIZES = {
    "enlarge": ((3, 2), (5, 7)),
    "shrink, some tokens are never read": ((7, 5), (3, 2)),
    "from one token": ((1, 1), (3, 3)),
    "equal": ((3, 3), (3, 3)),
}
ROWS = {"all rows": None, "repeats and negatives, out of order": [2, -1, 0, 2, -7]}
VECTORS, ODD = 72, 37  # channels: in whole vectors of every dtype, and not

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_size = pytest.mark.parametrize(("in_size", "out_size"), SIZES.values(), ids=SIZES)
each_width = pytest.mark.parametrize("channels", [VECTORS, ODD], ids=["vectors", "single elements"])


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Iterator[cuda.Library]:
    """On the GPU of ``--gpu``, by default on Hopper."""
    gpu = request.config.getoption("--gpu") or "sm_90"
    with cuda.library({"sm_90": "90a"}.get(gpu, gpu.removeprefix("sm_"))) as library:
        yield library


@pytest.fixture
def on_hopper() -> Iterator[cuda.Library]:
    with cuda.library("90a") as library:
        yield library


def tensor_rows(rows: list[int] | None) -> Tensor | None:
    return None if rows is None else torch.tensor(rows, dtype=torch.int64)


def check_forward(x: Tensor, rows: list[int] | None, in_size: tuple[int, int], out_size: tuple[int, int]) -> None:
    arguments = tensor_rows(rows), list(in_size), list(out_size)
    actual = cuda_impl.forward(x, *arguments)
    truth, plain = reference.feature_resample(x.double(), *arguments), reference.feature_resample(x, *arguments)
    check_budget("value", actual, truth, plain)


def check_backward(grad: Tensor, in_size: tuple[int, int], out_size: tuple[int, int]) -> None:
    sizes = list(in_size), list(out_size)
    actual = cuda_impl.backward(grad, *sizes)
    truth, plain = (reference.feature_resample_backward(g, *sizes) for g in (grad.double(), grad))
    check_budget("gradient", actual, truth, plain)


def assert_launched(library: cuda.Library, kernel: str, dtype: torch.dtype, vectors: bool) -> None:
    elements = 16 // dtype.itemsize if vectors else 1
    (launch,) = library.launches
    assert re.search(rf"\d{kernel}I{DTYPES[dtype]}Li{elements}E", launch.name), launch


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@each_size
@each_width
@each_dtype
def test_forward(dtype, channels, in_size, out_size, rows, library) -> None:
    check_forward(torch.randn(3, math.prod(in_size), channels).to(dtype), rows, in_size, out_size)
    assert_launched(library, "forward", dtype, channels == VECTORS)


@each_size
@each_width
@each_dtype
def test_backward(dtype, channels, in_size, out_size, library) -> None:
    check_backward(torch.randn(3, math.prod(out_size), channels).to(dtype), in_size, out_size)
    assert_launched(library, "backward", dtype, channels == VECTORS)


WIDE = VECTORS + 24
VIEWS = {  # of (3, 15, WIDE); the flag says whether 16-byte accesses are aligned
    "gaps behind tokens": (lambda x: x[:, :, :VECTORS], True),
    "misaligned": (lambda x: x[:, :, 1 : VECTORS + 1], False),
    "gaps behind rows": (lambda x: x[:, :6], True),
    "every other token": (lambda x: x[:, 1:13:2], True),
    "channels are not adjacent, so they are copied": (lambda x: x[:, :6, ::2], True),
}


@pytest.mark.parametrize(("view", "vectors"), VIEWS.values(), ids=VIEWS)
@each_dtype
def test_views(view, vectors, dtype, on_hopper) -> None:
    tokens = view(torch.empty(3, 15, WIDE)).shape[1]
    size, other = (tokens // 3, 3), (4, 2)
    wide = torch.full((3, 15, WIDE), torch.nan, dtype=dtype)  # around the view: what must not be read
    view(wide).normal_()
    check_forward(view(wide), [2, -1, 0], size, other)
    assert_launched(on_hopper, "forward", dtype, vectors)
    on_hopper.launches.clear()
    check_backward(view(wide), other, size)
    assert_launched(on_hopper, "backward", dtype, vectors)


def test_strides_of_the_result(on_hopper) -> None:
    x, wide = torch.randn(2, 6, 8), torch.full((2, 21, 12), 7.0)
    y = wide[:, :20, :8]
    cuda_impl._fwd(**cuda_impl.fields(x, None, y, [2, 3], [4, 5]), device=cuda.CPU, stream=cuda.STREAM)
    assert torch.equal(y, cuda_impl.forward(x, None, [2, 3], [4, 5]))
    assert (wide[:, 20] == 7).all() and (wide[:, :, 8:] == 7).all()


def test_more_rows_than_a_grid_has(on_hopper) -> None:
    rows = torch.arange(65_537) % 3
    y = cuda_impl.forward(torch.arange(3.0)[:, None, None], rows, [1, 1], [1, 1])
    assert on_hopper.launches[0].grid == (1, 65_535, 1)
    assert torch.equal(y.flatten(), rows.float())


def test_all_sources_and_architectures_are_emulated() -> None:
    assert set(cuda.ROOT.glob("csrc/*/*.cu")) <= set(cuda.sources())
    built = re.search(r'MOVA_CUDA_ARCHS "(.*?)"', (cuda.ROOT / "CMakeLists.txt").read_text())
    assert [a.partition("-")[0] for a in built[1].split(";")] == list(cuda.DEVICES)


def test_nothing_to_do_launches_nothing(on_hopper) -> None:
    for shape in ((0, 6, 8), (2, 6, 0)):
        assert cuda_impl.forward(torch.empty(shape), None, [2, 3], [1, 2]).shape == (shape[0], 2, shape[2])
    assert not on_hopper.launches


# ---- Errors ----


def call(x: Tensor, y: Tensor, rows: Tensor | None = None, **fields: object) -> None:
    """mk_feature_resample_cuda_fwd on x (R, 6, C) and y (M, 20, C), with other fields of its block."""
    block = cuda_impl.fields(x, rows, y, [2, 3], [4, 5]) | {"device": cuda.CPU, "stream": cuda.STREAM}
    cuda_impl._fwd(**block | fields)


X, Y = torch.zeros(3, 6, 8), torch.zeros(3, 20, 8)


def test_errors_of_the_library(on_hopper, monkeypatch) -> None:
    call(X, Y)
    with pytest.raises(ValueError, match=r"^mk_feature_resample_cuda_fwd: in_h must be in \[1, 32767\], got 0$"):
        call(X, Y, in_h=0)
    monkeypatch.setitem(_compiled.DTYPES, torch.float64, 3)
    with pytest.raises(ValueError, match=r"dtype must be in \[0, 2\], got 3"):
        call(X, Y, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        call(X, Y, device=5)
    with pytest.raises(ValueError, match=r"the argument block must have 128 bytes, got 8"):
        _compiled.function("mk_feature_resample_cuda_fwd", "x", "", "cuda")(x=None)
    assert len(on_hopper.launches) == 1


def test_failed_launches_are_reported(on_hopper, monkeypatch) -> None:
    monkeypatch.setattr(on_hopper, "device", on_hopper.device._replace(major=7))
    with pytest.raises(RuntimeError, match="mk_feature_resample_cuda_fwd: cudaErrorNoKernelImageForDevice"):
        call(X, Y)


WRONG = {
    "a row that does not exist": {"rows": torch.tensor([0, 3, 1])},
    "fewer rows than results": {"rows": torch.tensor([0, 1])},
    "more results than there is memory for": {"M": 4},
    "more channels than there are": {"C": 12},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_accesses_outside_of_the_tensors(wrong, on_hopper) -> None:
    with pytest.raises(cuda.Fault):
        call(X.clone(), Y.clone(), **wrong)
    call(X, Y)  # a fault leaves nothing behind


WRONG_STRIDES = {"tokens too far apart": ("x", (48, 16)), "results before the memory": ("y", (-160, 8))}


@pytest.mark.parametrize(("tensor", "strides"), WRONG_STRIDES.values(), ids=WRONG_STRIDES)
def test_strides_that_leave_the_tensors(tensor, strides, on_hopper, monkeypatch) -> None:
    at = f"{cuda_impl.TENSORS} {cuda_impl.NUMBERS}".split().index(f"{tensor}_stride_row")

    def pack(layout: str, *fields: int) -> bytes:
        return struct.pack(layout, *fields[:at], *strides, *fields[at + 2 :])

    with monkeypatch.context() as patch, pytest.raises(cuda.Fault):
        patch.setattr(_compiled, "_pack", pack)
        call(X.clone(), Y.clone())
    call(X, Y)  # a fault leaves nothing behind


def test_work_on_another_stream(on_hopper) -> None:
    with pytest.raises(cuda.Fault, match="on stream 0x0, but the caller's stream is 0x57ea00"):
        call(X, Y, stream=0)


def test_afterwards_the_library_is_the_ordinary_one() -> None:
    before = _compiled._call, _compiled._cuda, _compiled.cuda_reason
    with cuda.library("80"):
        assert _compiled.cuda_reason() is None and _compiled._call is not before[0]
    assert (_compiled._call, _compiled._cuda, _compiled.cuda_reason) == before
