// For launchers of sm_90a kernels: tensor maps, which TMA reads, and the persistent grid.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace mk {

// A tensor of three dimensions of which the first has stride 1, and the box that one copy moves. Strides are in bytes
// and multiples of 16, and so is the address.
struct BoxedTensor {
  uint64_t address;
  int64_t sizes[3], strides[2];
  int32_t box[3];
};

// The driver's function comes from the runtime, so that the library does not link to libcuda.
inline cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, const BoxedTensor& t,
                                   CUtensorMapSwizzle swizzle) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return (decltype(&cuTensorMapEncodeTiled))function;
  }();
  if (!encode) return cudaErrorInsufficientDriver;
  const cuuint64_t sizes[] = {(cuuint64_t)t.sizes[0], (cuuint64_t)t.sizes[1], (cuuint64_t)t.sizes[2]};
  const cuuint64_t strides[] = {(cuuint64_t)t.strides[0], (cuuint64_t)t.strides[1]};
  const cuuint32_t box[] = {(cuuint32_t)t.box[0], (cuuint32_t)t.box[1], (cuuint32_t)t.box[2]}, ones[] = {1, 1, 1};
  const CUresult result =
      encode(map, type, 3, (void*)t.address, sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace mk
