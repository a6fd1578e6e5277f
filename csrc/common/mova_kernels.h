// The C API that all ops share; each op adds a header of its own. It knows neither torch nor Python.
//
// A function of an op takes one argument block, `args`, whose size is `nbytes`, and returns an mk_status. Every field
// of a block has 8 bytes. Strides are in elements; the stride of a channel is 1. Tensors without strides are
// contiguous. Tensors that are written overlap no other, unless the header says so.
#pragma once

#include <stdint.h>

#define MK_API extern "C" __attribute__((visibility("default")))

// Raised when a function is added, or when its argument block or meaning changes. mova_kernels/_compiled.py states the
// same number.
#define MK_ABI_VERSION 6

enum mk_status {
  MK_OK = 0,
  MK_BAD_ARG = 1,
  MK_UNSUPPORTED = 2,
  MK_CUDA_ERROR = 3,
  MK_THREADS_ERROR = 4,
  MK_NO_MEMORY = 5
};
// The most channels of a token that is normalised on a CPU. They are kept in fp32 on the stack, in the L1 cache.
enum { MK_MAX_NORM_CHANNELS = 8192 };

enum mk_dtype { MK_F32 = 0, MK_BF16 = 1, MK_F16 = 2 };

MK_API int mk_abi_version(void);

// Why the latest failed call of this thread failed; valid until the next failure.
MK_API const char* mk_last_error(void);

// CPU library: runs body(begin, end, context) over disjoint parts of [begin, end), returns non-zero on failure. It has
// the signature of libtorch's torch_parallel_for; null, the default, runs everything on the calling thread.
typedef void (*mk_range_body)(int64_t begin, int64_t end, void* context);
typedef int (*mk_parallel_for)(int64_t begin, int64_t end, int64_t grain, mk_range_body body, void* context);
MK_API void mk_set_parallel_for(mk_parallel_for parallel_for);

// CPU library: the instruction sets are "base", "avx2", "avx512" and "avx512_bf16". The best one this processor has is
// the default.
MK_API const char* mk_cpu_isa(void);
MK_API const char* mk_cpu_isas(void);  // those this processor has, "base,avx2"
MK_API int mk_set_cpu_isa(const char* name);

// CPU library: asks the system for huge pages in fresh memory, which is several times faster to touch then.
MK_API void mk_advise_huge_pages(uint64_t memory, uint64_t bytes);

// CUDA library: versions as 1000 * major + 10 * minor; a driver version of 0 means that there is no driver.
MK_API int mk_cuda_runtime_version(void);
MK_API int mk_cuda_driver_version(void);
MK_API int mk_cuda_device_count(int64_t* count);
