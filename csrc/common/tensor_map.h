// For launchers of sm_90a kernels: tensor maps, which TMA reads, and the persistent grid.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "common/mova_kernels.h"

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

// A tensor (P, L, C) of bf16 or fp16, in boxes of 64 channels of `tokens` tokens, as tiles of hopper.h. Strides are in
// elements.
inline cudaError_t map_tokens(CUtensorMap* map, int64_t dtype, uint64_t address, int64_t P, int64_t L, int64_t C,
                              int64_t stride_pair, int64_t stride_token, int tokens) {
  const auto type = dtype == MK_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const BoxedTensor tensor{address, {C, L, P}, {2 * stride_token, 2 * stride_pair}, {64, tokens, 1}};
  return make_tensor_map(map, type, tensor, CU_TENSOR_MAP_SWIZZLE_128B);
}

// The grid of a kernel whose blocks work off `items` one after another, one block on each multiprocessor. Also allows
// the kernel its shared memory.
template <class Kernel>
cudaError_t persistent_blocks(int* blocks, Kernel* kernel, int shared_bytes, int64_t items, int64_t device) {
  int multiprocessors = 0;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, (int)device);
  *blocks = (int)(items < multiprocessors ? items : multiprocessors);
  return error;
}

}  // namespace mk
