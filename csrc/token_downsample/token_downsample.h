// The steps between the matrix products of a stage of token_downsample, on row-major tokens. With x the tokens,
//     a = conv1 x, h = SiLU(LN a), c = conv2 h, s = SiLU(LN c), v = s * gate, d = conv3 v, result = pool(x + LN d),
// where conv1 and conv3 are matrix products, conv2 is a depthwise 3x3 convolution and gate comes from the mean of s
// over all tokens. LN and all values that are not stored are fp32.
#pragma once

#include "common/mova_kernels.h"

// Arguments of every step; fields that a step does not use are 0.
struct mk_token_downsample_args {
  uint64_t x;          // (B, R * R, C)
  uint64_t grad;       // (B, R * R, C)
  uint64_t outer;      // (B, R * R, C), or the gradient of the result (B, side * side, C)
  uint64_t weight;     // (C,) fp32
  uint64_t bias;       // (C,) fp32
  uint64_t taps;       // (9, C) fp32
  uint64_t gate;       // (B, C) fp32
  uint64_t grad_mean;  // (B, C) fp32: the gradient of the mean of s
  uint64_t y;          // (B, R * R, C), or the result (B, side * side, C), written
  uint64_t partial;    // (B, R, num_sums, C) fp32, scratch
  uint64_t sums;       // (B, C) or (num_sums, C) fp32, written; the same bits for any number of threads
  int64_t B, R, C, num_sums;
  int64_t outer_stride_sample, outer_stride_token;
  int64_t pool;   // 0: side = R; 1: side = R / 2, windows of 2x2 or, for an odd R, of 3x3 that overlap
  int64_t dtype;  // mk_dtype of all that is not fp32: MK_F32 or MK_BF16
  double eps;
};

// Each step is one pass over the tokens. All but add_bwd also read the weight and bias of LN, whose gradients are the
// sums (2, C). num_sums is 1 for sums (B, C), and 0 for none.

// x: a or c; gate or 0 -> y: h or v
MK_API int mk_token_downsample_norm_silu(const void* args, uint64_t nbytes);
// x: h; taps -> y: c; sums (B, C): of s over tokens
MK_API int mk_token_downsample_conv(const void* args, uint64_t nbytes);
// x: d; outer: the stage's x -> y: the result
MK_API int mk_token_downsample_norm_add(const void* args, uint64_t nbytes);
// x: d; outer: grad of the result -> y: grad of d; sums (2, C)
MK_API int mk_token_downsample_norm_add_bwd(const void* args, uint64_t nbytes);
// x: c; grad: of v; gate -> y: v; sums (B, C): grad of gate
MK_API int mk_token_downsample_gate_bwd(const void* args, uint64_t nbytes);
// x: c; grad: of v; gate; grad_mean -> y: grad of c, which may be grad; sums (2, C)
MK_API int mk_token_downsample_norm_silu_bwd(const void* args, uint64_t nbytes);
// x: a; grad: of c; taps -> y: grad of a; sums (11, C), the last 9: grads of taps
MK_API int mk_token_downsample_conv_bwd(const void* args, uint64_t nbytes);
// outer: grad of the result; adds the grad of the stage's x through "x +" to y
MK_API int mk_token_downsample_add_bwd(const void* args, uint64_t nbytes);
