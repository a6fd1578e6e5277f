// y = LayerNorm(p) with p = SiLU(gate) * up, over the first F of `width` channels. The others are ignored, and written
// as zeros. p, its mean and its (biased) variance stay in fp32, and y is rounded once.
#pragma once

#include "common/mova_kernels.h"

struct mk_swiglu_norm_fwd_args {
  uint64_t gate, up;      // (B, L, width), read
  uint64_t weight, bias;  // (width,) fp32, read
  uint64_t y;             // (B, L, width), written
  uint64_t mean, rstd;    // (B, L) fp32, written: mean(p) and 1 / sqrt(var(p) + eps)
  int64_t B, L, width, F;
  int64_t gate_stride_sample, gate_stride_token, up_stride_sample, up_stride_token;
  double eps;
  int64_t dtype;  // mk_dtype of gate, up and y: MK_F32 or MK_BF16
};

// Block b of the tokens, [B * L * b / blocks, B * L * (b + 1) / blocks), has its own sums over tokens, and the sums of
// the blocks are added in order: the number of threads changes no bit.
struct mk_swiglu_norm_bwd_args {
  uint64_t grad, gate, up;          // (B, L, width), read
  uint64_t weight;                  // (width,) fp32, read
  uint64_t mean, rstd;              // (B, L) fp32, read: what fwd wrote
  uint64_t grad_gate, grad_up;      // (B, L, width), written
  uint64_t sums;                    // (blocks, 2, width) fp32, scratch
  uint64_t grad_weight, grad_bias;  // (width,) fp32, written
  int64_t B, L, width, F, blocks;
  int64_t grad_stride_sample, grad_stride_token;
  int64_t gate_stride_sample, gate_stride_token, up_stride_sample, up_stride_token;
  int64_t dtype;  // mk_dtype of grad, gate, up and their gradients: MK_F32 or MK_BF16
};

MK_API int mk_swiglu_norm_fwd(const void* args, uint64_t nbytes);
MK_API int mk_swiglu_norm_bwd(const void* args, uint64_t nbytes);
