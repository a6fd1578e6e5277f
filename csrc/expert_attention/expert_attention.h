// Attention of P (sample, expert) pairs with H heads of width D: softmax(rope(q) rope(k)^T / sqrt(D)) v per pair and
// head, where rope rotates channels as rope2d.h does. Scores are never stored. Sums are fp32, or fp64 where fp32 cannot
// hold scores or sums; with the instruction set avx512_bf16 and bf16 tensors, factors of products are rounded to bf16.
//
// The log-sum-exp that forward saves is in powers of 2, the unit of the loops. In natural units it would be rounded
// once more, which was measured to add up to a quarter to the errors of the gradients.
#pragma once

#include "common/mova_kernels.h"

enum { MK_MAX_HEAD_WIDTH = 256 };

struct mk_expert_attention_fwd_args {
  uint64_t q, k, v;   // (P, L, H*D), read
  uint64_t cos, sin;  // (L, D) fp32, read
  uint64_t out;       // (P, L, H*D), written
  uint64_t lse;       // (P, H, L) fp32, written: log2 of the sum over keys of e^score
  int64_t P, L, H, D;
  int64_t q_stride_pair, q_stride_token, k_stride_pair, k_stride_token, v_stride_pair, v_stride_token;
  int64_t dtype;  // mk_dtype of q, k, v and out: MK_F32 or MK_BF16
};

struct mk_expert_attention_bwd_args {
  uint64_t grad, q, k, v;           // (P, L, H*D), read
  uint64_t out, lse;                // read: what fwd wrote
  uint64_t cos, sin;                // (L, D) fp32, read
  uint64_t grad_q, grad_k, grad_v;  // (P, L, H*D), written
  int64_t P, L, H, D;
  int64_t grad_stride_pair, grad_stride_token, q_stride_pair, q_stride_token;
  int64_t k_stride_pair, k_stride_token, v_stride_pair, v_stride_token;
  int64_t dtype;  // mk_dtype of all but the tables and lse: MK_F32 or MK_BF16
};

MK_API int mk_expert_attention_fwd(const void* args, uint64_t nbytes);
MK_API int mk_expert_attention_bwd(const void* args, uint64_t nbytes);

// CUDA, for devices of compute capability 9.0 alone: D is 64 or 128; tensors with strides begin at multiples of 16
// bytes and have strides that are multiples of 8 elements; P * H * L has a limit.
enum { MK_CUDA_MAX_QUERIES = 2147483647 };

// How 2^score is kept within the range of fp32. Whatever is chosen, a tile of queries whose sums leave the range is
// computed again with MK_RANGE_ONLINE.
enum mk_attention_range {
  MK_RANGE_NONE = 0,        // nothing is subtracted from scores; bf16 alone
  MK_RANGE_FIRST = 1,       // the maximum of a tile of keys, the first one to be read; bf16 alone
  MK_RANGE_ONLINE = 2,      // the maximum so far
  MK_RANGE_POLYNOMIAL = 3,  // as NONE, and a polynomial computes every fourth power of 2
};

struct mk_expert_attention_cuda_fwd_args {
  uint64_t q, k, v;             // (P, L, H*D), read
  uint64_t cos, sin;            // (L, D) fp32, read
  uint64_t num_valid;           // (1,) int64, read: pairs from there on are padding, and get zeros; 0: there is none
  uint64_t turned_q, turned_k;  // (P, L, H*D), scratch
  uint64_t retry;               // (1 + 2 * P * H * ceil(L / 64),) int32, scratch
  uint64_t out, lse;            // as for the CPU, written
  int64_t P, L, H, D;
  int64_t q_stride_pair, q_stride_token, k_stride_pair, k_stride_token, v_stride_pair, v_stride_token;
  int64_t range;    // mk_attention_range
  int64_t dtype;    // mk_dtype of q, k, v and out: MK_BF16 or MK_F16
  int64_t device;   // ordinal; made current for the launches only
  uint64_t stream;  // cudaStream_t of that device
};

struct mk_expert_attention_cuda_bwd_args {
  uint64_t grad, q, k, v;           // (P, L, H*D), read
  uint64_t out, lse;                // contiguous, read: what fwd wrote
  uint64_t cos, sin;                // (L, D) fp32, read
  uint64_t num_valid;               // as for fwd
  uint64_t turned_q, turned_k;      // (P, L, H*D), scratch
  uint64_t row_sums;                // (P, H, ceil(L / 64) * 64, 2) fp32, scratch
  uint64_t wide_heads;              // (P, H) int32, scratch
  uint64_t wide_sums;               // (P, H, 3, L) fp64, scratch
  uint64_t grad_q, grad_k, grad_v;  // (P, L, H*D), contiguous, written
  int64_t P, L, H, D;
  int64_t grad_stride_pair, grad_stride_token, q_stride_pair, q_stride_token;
  int64_t k_stride_pair, k_stride_token, v_stride_pair, v_stride_token;
  int64_t dtype;    // mk_dtype of all but the tables and the scratch: MK_BF16 or MK_F16
  int64_t device;   // ordinal; made current for the launches only
  uint64_t stream;  // cudaStream_t of that device
};

MK_API int mk_expert_attention_cuda_fwd(const void* cuda_args, uint64_t nbytes);
MK_API int mk_expert_attention_cuda_bwd(const void* cuda_args, uint64_t nbytes);
