// The interface between the launcher and the kernels for sm_90a.
#pragma once

#include "common/cuda.h"
#include "common/tensor_map.h"
#include "expert_attention/expert_attention.h"
#include "expert_attention/work.h"

namespace mk {

constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

// Scores in powers of 2 are the products of turned queries and keys times this. In bf16, turned queries have the factor
// already: nothing has to be multiplied where no maximum is subtracted. In fp16 they could become subnormal by it.
inline float score_scale(int64_t dtype, int64_t width) { return dtype == MK_BF16 ? 1 : log2_e / sqrtf((float)width); }
inline float query_scale(int64_t dtype, int64_t width) { return dtype == MK_BF16 ? log2_e / sqrtf((float)width) : 1; }

// What the gradient of turned keys is multiplied by, since turned queries have a factor.
inline float key_scale(int64_t dtype, int64_t width) { return dtype == MK_BF16 ? ln_2 : 1 / sqrtf((float)width); }

// The tensor map of (P, L, H*D), or of a contiguous one, in boxes of 64 channels of some tokens.
template <class Args>
cudaError_t map_tokens(CUtensorMap* map, const Args& a, uint64_t address, int64_t stride_pair, int64_t stride_token,
                       int tokens) {
  return map_tokens(map, a.dtype, address, a.P, a.L, a.H * a.D, stride_pair, stride_token, tokens);
}
template <class Args>
cudaError_t map_tokens(CUtensorMap* map, const Args& a, uint64_t address, int tokens) {
  return map_tokens(map, a, address, a.L * a.H * a.D, a.H * a.D, tokens);
}

// Whether fp64 must compute a query with this log-sum-exp, in powers of 2: a large one, rounded to fp32, makes weights
// wrong by 1.7e-4, and the main kernels leave NaN where fp32 overflows.
__device__ inline bool is_wide(float lse) { return !(fabsf(lse) <= 4096); }

// These launch kernels on the current device: those that read turned queries and keys, and those in fp64.
#ifdef MK_HAS_SM90A
cudaError_t launch_forward_sm90a(const mk_expert_attention_cuda_fwd_args& a);
cudaError_t launch_grad_kv_sm90a(const mk_expert_attention_cuda_bwd_args& a);
cudaError_t launch_grad_q_sm90a(const mk_expert_attention_cuda_bwd_args& a);
#else  // a build for other architectures
inline cudaError_t launch_forward_sm90a(const mk_expert_attention_cuda_fwd_args&) {
  return cudaErrorNoKernelImageForDevice;
}
inline cudaError_t launch_grad_kv_sm90a(const mk_expert_attention_cuda_bwd_args&) {
  return cudaErrorNoKernelImageForDevice;
}
inline cudaError_t launch_grad_q_sm90a(const mk_expert_attention_cuda_bwd_args&) {
  return cudaErrorNoKernelImageForDevice;
}
#endif
cudaError_t launch_wide_forward(const mk_expert_attention_cuda_fwd_args& a);
cudaError_t launch_wide_backward(const mk_expert_attention_cuda_bwd_args& a);

}  // namespace mk
