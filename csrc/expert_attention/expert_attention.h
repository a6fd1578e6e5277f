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
