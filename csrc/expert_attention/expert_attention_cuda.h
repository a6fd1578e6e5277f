// The interface between the launcher and the kernels for sm_90a.
#pragma once

#include "common/cuda.h"
#include "expert_attention/expert_attention.h"
#include "expert_attention/work.h"

namespace mk {

constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

// Scores in powers of 2 are the products of turned queries and keys times this. In bf16, turned queries have the factor
// already: nothing has to be multiplied where no maximum is subtracted. In fp16 they could become subnormal by it.
inline float score_scale(int64_t dtype, int64_t width) { return dtype == MK_BF16 ? 1 : log2_e / sqrtf((float)width); }
inline float query_scale(int64_t dtype, int64_t width) { return dtype == MK_BF16 ? log2_e / sqrtf((float)width) : 1; }

// These launch kernels on the current device: those that read turned queries and keys, and those in fp64.
#ifdef MK_HAS_SM90A
cudaError_t launch_forward_sm90a(const mk_expert_attention_cuda_fwd_args& a);
#else  // a build for other architectures
inline cudaError_t launch_forward_sm90a(const mk_expert_attention_cuda_fwd_args&) {
  return cudaErrorNoKernelImageForDevice;
}
#endif
cudaError_t launch_wide_forward(const mk_expert_attention_cuda_fwd_args& a);

}  // namespace mk
