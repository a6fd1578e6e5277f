// For the launcher of an op: errors, the current device, and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/host.h"

namespace mk {

inline int cuda_status(const char* function, cudaError_t error) {
  if (error == cudaSuccess) return MK_OK;
  return fail(MK_CUDA_ERROR, "%s: %s (%s)", function, cudaGetErrorName(error), cudaGetErrorString(error));
}

// Makes a device current for a scope. Costs one query where it is current already, which is the usual case.
class DeviceGuard {
 public:
  explicit DeviceGuard(int64_t device) : target_((int)device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != target_) {
      error_ = cudaSetDevice(target_);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int target_, previous_ = 0;
  bool switched_ = false;
  cudaError_t error_;
};

// `n` neighbouring elements, loaded and stored by one instruction where they fill 16 bytes.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T element[n];
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ T from_float(float v);  // rounds to nearest, ties to even
template <>
__device__ inline float from_float(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 from_float(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half from_float(float v) {
  return __float2half_rn(v);
}

}  // namespace mk
