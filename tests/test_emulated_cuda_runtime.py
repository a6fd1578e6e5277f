"""What stands in for libcudart refuses what a device would, and what it does not know."""

from __future__ import annotations

import struct

import pytest
import torch
from emulator import cuda

if cuda.reason():
    pytest.skip(f"nothing to emulate with: {cuda.reason()}", allow_module_level=True)

PROBE = r"""
#include <cuda.h>
#include "common/cuda.h"

namespace {
struct Args {
  uint64_t to;  // (64,) int32
  int64_t value[8];
  uint64_t stream;
};

__global__ void __launch_bounds__(256) fill(int32_t* to, int32_t narrow, int64_t wide) {
  __shared__ int32_t rounds[64];
  rounds[threadIdx.x % 64] = narrow;
  to[blockIdx.x * blockDim.x + threadIdx.x] = rounds[threadIdx.x % 64] + (int32_t)wide;
}
}  // namespace

extern "C" __global__ void only_on_hopper(int32_t* to);

#define PROBE(name)                                                                                           \
  static cudaError_t name(const Args& a);                                                                     \
  MK_API int mk_##name(const void* block, uint64_t nbytes) {                                                  \
    const auto run = +[](const char* f, const Args& a) { return mk::cuda_status(f, name(a)); };               \
    return mk::call(#name, run, block, nbytes);                                                               \
  }                                                                                                           \
  static cudaError_t name(const Args& a)

PROBE(launch) {
  const int64_t* v = a.value;  // grid, block, shared, allowed
  if (v[6] >= 0) {
    if (auto e = cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)v[6])) return e;
  }
  fill<<<dim3(v[0], v[1], v[2]), dim3(v[3], v[4]), v[5], (cudaStream_t)a.stream>>>((int32_t*)a.to, -3, 1ll << 33 | 10);
  const auto peeked = cudaPeekAtLastError(), error = cudaGetLastError();
  return peeked == error && cudaGetLastError() == cudaSuccess ? error : cudaErrorUnknown;
}

PROBE(careless) {
  fill<<<0, 32, 0, (cudaStream_t)a.stream>>>((int32_t*)a.to, 0, 0);
  return cudaSuccess;
}

PROBE(cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = (unsigned)a.value[0], attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = 2, config.blockDim = 32, config.stream = (cudaStream_t)a.stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, fill, (int32_t*)a.to, (int32_t)1, (int64_t)1);
}

PROBE(attribute) { return cudaDeviceGetAttribute((int*)a.to, (cudaDeviceAttr)a.value[0], -1); }

PROBE(occupancy) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor((int*)a.to, fill, (int)a.value[0], (size_t)a.value[1]);
}

PROBE(memory) {
  if (auto e = cudaMemsetAsync((void*)a.to, 1, (size_t)a.value[0], (cudaStream_t)a.stream)) return e;
  const int32_t seven = 7;
  return cudaMemcpyAsync((int32_t*)a.to + 1, &seven, 4, (cudaMemcpyKind)a.value[1], (cudaStream_t)a.stream);
}

PROBE(entry) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  return cudaGetDriverEntryPointByVersion("cuInit", &function, 12000, cudaEnableDefault, &found);
}

PROBE(map) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  const int64_t* v = a.value;  // inner and outer size, stride, inner and outer box, swizzle, offset, rank
  const cuuint64_t dims[5] = {(cuuint64_t)v[0], (cuuint64_t)v[1], 1, 1, 1}, stride = (cuuint64_t)v[2];
  const cuuint64_t strides[4] = {stride, stride * 32, stride * 32, stride * 32};
  const cuuint32_t box[5] = {(cuuint32_t)v[3], (cuuint32_t)v[4], 1, 1, 1}, ones[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = ((decltype(&cuTensorMapEncodeTiled))function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)v[7], (char*)a.to + v[6], dims, strides, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, (CUtensorMapSwizzle)v[5], CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return result == CUDA_ERROR_INVALID_VALUE ? cudaErrorInvalidValue : cudaErrorUnknown;
  memcpy((void*)a.to, &map, sizeof map);
  return cudaSuccess;
}

PROBE(hopper) {
  only_on_hopper<<<1, 32, 0, (cudaStream_t)a.stream>>>((int32_t*)a.to);
  return cudaGetLastError();
}
"""
HOPPER = '#include <stdint.h>\nextern "C" __global__ void only_on_hopper(int32_t* to) { to[threadIdx.x] = 5; }\n'
HOST = cuda.ROOT / "csrc" / "common" / "host.cpp"


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, cuda.Library]:
    folder = tmp_path_factory.mktemp("probe")
    for name, text in {"probe.cu": PROBE, "hopper_sm90a.cu": HOPPER}.items():
        (folder / name).write_text(text)
    sources = [folder / "probe.cu", folder / "hopper_sm90a.cu", HOST]
    return {a: cuda.Library(cuda.build(sources, a), cuda.DEVICES[a]) for a in ("80", "90a")}


@pytest.fixture
def probe(libraries):
    """probe(function, *values) -> what it wrote."""

    def call(function: str, *values: int, device: str = "90a", stream: int = cuda.STREAM) -> list[int]:
        to = torch.zeros(64, dtype=torch.int32)
        block = struct.pack("=Q8qQ", to.data_ptr(), *values, *[0] * (8 - len(values)), stream)
        libraries[device].call(f"mk_{function}", block, [to])
        return to.tolist()

    return call


def launch(grid=(2, 1, 1), block=(32, 1), shared=0, allowed=-1):
    return *grid, *block, shared, allowed


def test_arguments_of_every_width_arrive(probe, libraries) -> None:
    assert probe("launch", *launch()) == [7] * 64
    last = libraries["90a"].launches[-1]
    assert (last.grid, last.block, last.shared) == ((2, 1, 1), (32, 1, 1), 0)


REFUSED_LAUNCHES = {
    "too many threads": (launch(block=(1025, 1)), "cudaErrorInvalidConfiguration"),
    "no threads": (launch(block=(0, 1)), "cudaErrorInvalidConfiguration"),
    "no blocks": (launch(grid=(0, 1, 1)), "cudaErrorInvalidConfiguration"),
    "a grid too high": (launch(grid=(1, 65536, 1)), "cudaErrorInvalidConfiguration"),
    "shared memory that was not asked for": (launch(shared=48 * 1024 - 255), "cudaErrorInvalidValue"),
    "more shared memory than was asked for": (launch(shared=65, allowed=64), "cudaErrorInvalidValue"),
    "more shared memory than there is": (launch(allowed=227 * 1024 - 255), "cudaErrorInvalidValue"),
}


@pytest.mark.parametrize(("values", "error"), REFUSED_LAUNCHES.values(), ids=REFUSED_LAUNCHES)
def test_launches_that_a_device_refuses(values, error, probe) -> None:
    with pytest.raises(RuntimeError, match=error):
        probe("launch", *values)


def test_shared_memory_up_to_the_limit(probe) -> None:
    for bytes_ in (0, 227 * 1024 - 256):
        assert probe("launch", *launch(shared=bytes_, allowed=bytes_)) == [7] * 64


def test_more_threads_than_the_launch_bound(probe) -> None:
    with pytest.raises(cuda.Fault, match="288 threads in a block, its launch bound is 256"):
        probe("launch", *launch(block=(32, 9)))


def test_errors_that_nobody_reads(probe) -> None:
    with pytest.raises(cuda.Fault, match="mk_careless succeeded, but left cudaErrorInvalidConfiguration unread"):
        probe("careless")


def test_clusters(probe) -> None:
    assert probe("cluster", 1) == [2] * 64
    with pytest.raises(cuda.Fault, match=r"launch attribute 4 .* is not emulated"):
        probe("cluster", 2)


def test_streams(probe) -> None:
    for function, values in (("launch", launch()), ("memory", (8, 1))):
        with pytest.raises(cuda.Fault, match="on stream 0x0"):
            probe(function, *values, stream=0)


def test_kernels_of_another_architecture(probe) -> None:
    assert probe("hopper") == [5] * 32 + [0] * 32
    with pytest.raises(RuntimeError, match="cudaErrorNoKernelImageForDevice"):
        probe("hopper", device="80")
    assert probe("launch", *launch(), device="80") == [7] * 64


def test_attributes(probe) -> None:
    multiprocessors, major = 16, 75
    assert probe("attribute", multiprocessors)[0] == 132 and probe("attribute", multiprocessors, device="80")[0] == 108
    assert probe("attribute", major)[0] == 9 and probe("attribute", major, device="80")[0] == 8
    with pytest.raises(cuda.Fault, match=r"cudaDeviceGetAttribute: attribute 13 .* is not emulated"):
        probe("attribute", 13)


def test_occupancy(probe) -> None:
    assert probe("occupancy", 256, 0)[0] == 8  # of 2048 threads
    assert probe("occupancy", 32, 100 * 1024)[0] == 2  # of 228 KiB


def test_memory(probe) -> None:
    to_device, default = 1, 4
    assert probe("memory", 8, to_device)[:3] == [0x01010101, 7, 0]
    with pytest.raises(cuda.Fault, match=r"the 257 bytes from .* are outside of all tensors"):
        probe("memory", 257, to_device)
    with pytest.raises(cuda.Fault, match="cudaMemcpyDefault is not emulated"):
        probe("memory", 8, default)


def test_functions_of_the_driver(probe) -> None:
    with pytest.raises(cuda.Fault, match="the driver's function cuInit is not emulated"):
        probe("entry")


def tensor_map(size=(64, 20), stride=128, box=(64, 16), swizzle=3, offset=0, rank=2):
    return *size, stride, *box, swizzle, offset, rank


def test_tensor_map(probe) -> None:
    written = struct.pack("=64i", *probe("map", *tensor_map(offset=32)))
    _, base, *fields = struct.unpack_from("=QQ5Q4Q5H3H", written)  # tensor_map.h
    assert base % 16 == 0
    assert fields == [64, 20, 1, 1, 1, 128, 0, 0, 0, 64, 16, 1, 1, 1, 128, 2, 2]


BAD_MAPS = {
    "a misaligned address": tensor_map(offset=8),
    "a stride that is no multiple of 16": tensor_map(stride=136),
    "a stride shorter than a row": tensor_map(stride=112),
    "a box too long": tensor_map(box=(64, 257)),
    "an empty box": tensor_map(box=(64, 0)),
    "a box wider than the swizzle": tensor_map(swizzle=2),
    "rows of the box that are no multiple of 16 bytes": tensor_map(box=(60, 16)),
    "an empty tensor": tensor_map(size=(64, 0)),
    "no dimension": tensor_map(rank=0),
}


@pytest.mark.parametrize("values", BAD_MAPS.values(), ids=BAD_MAPS)
def test_tensor_maps_that_the_driver_refuses(values, probe) -> None:
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        probe("map", *values)


def test_tensor_maps_that_are_not_emulated(probe) -> None:
    with pytest.raises(cuda.Fault, match="cuTensorMapEncodeTiled: this swizzle is not emulated"):
        probe("map", *tensor_map(swizzle=4))
    with pytest.raises(cuda.Fault, match="a device without tensor maps"):
        probe("map", *tensor_map(), device="80")


def test_unknown_functions_do_not_link(tmp_path) -> None:
    source = tmp_path / "unknown.cpp"
    source.write_text("#include <cuda_runtime.h>\nint f(void** p) { return cudaMalloc(p, 1); }\n")
    with pytest.raises(RuntimeError, match="undefined reference to `cudaMalloc'"):
        cuda.build([source, HOST], "90a")
