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

// Makes a device current for a scope. It costs one query if the device is current already, the usual case.
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

// An error where kernels for sm_90a cannot run: on a device of another compute capability than 9.0.
inline cudaError_t require_hopper(int64_t device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, (int)device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, (int)device);
  return error || (major == 9 && minor == 0) ? error : cudaErrorNoKernelImageForDevice;
}

// `n` neighbouring elements. If they fill 16 bytes, they must be aligned to 16 and move as one uint4: the compiler
// tends to split the access otherwise.
template <class T, int n>
struct Pack {
  T element[n];
};

template <class T, int n>
__device__ Pack<T, n> load(const T* p) {
  Pack<T, n> pack;
  if constexpr (sizeof pack == sizeof(uint4)) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(&pack, &raw, sizeof pack);
  } else {
    for (int i = 0; i < n; ++i) pack.element[i] = p[i];
  }
  return pack;
}

template <class T, int n>
__device__ void store(T* p, const Pack<T, n>& pack) {
  if constexpr (sizeof pack == sizeof(uint4)) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof pack);
    *reinterpret_cast<uint4*>(p) = raw;
  } else {
    for (int i = 0; i < n; ++i) p[i] = pack.element[i];
  }
}

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
