#include "common/cuda.h"

MK_API int mk_cuda_runtime_version(void) { return CUDART_VERSION; }

MK_API int mk_cuda_driver_version(void) {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

MK_API int mk_cuda_device_count(int64_t* count) {
  int devices = 0;
  const int status = mk::cuda_status("cudaGetDeviceCount", cudaGetDeviceCount(&devices));
  *count = devices;
  return status;
}
