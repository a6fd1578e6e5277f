// Bilinear resampling of token grids as in feature_resample.h, then normalisation of every token of the result:
// y = (t - mean(t)) * rstd with rstd = 1 / sqrt(var(t) + eps), where t, its mean and its (biased) variance stay in fp32
// and y is rounded once. For a negative row nothing is read and nothing is written.
#pragma once

#include "common/mova_kernels.h"

struct mk_feature_norm_fwd_args {
  uint64_t x;     // (rows of x, in_h * in_w, C), read
  uint64_t rows;  // (M,) int64: the row of x that each row of y shows; 0: row m shows row m
  uint64_t y;     // (M, out_h * out_w, C), written
  uint64_t rstd;  // (M, out_h * out_w) fp32, written
  int64_t M, in_h, in_w, out_h, out_w, C;
  int64_t x_stride_row, x_stride_token;
  double eps;
  int64_t dtype;  // mk_dtype of x and y: MK_F32 or MK_BF16
};

// The gradient through the normalisation alone: with the means over channels,
// grad_t = rstd * (grad - mean(grad) - y * mean(grad * y)). mk_feature_resample_bwd takes it on to x.
struct mk_feature_norm_bwd_args {
  uint64_t grad;    // (M, L, C), read
  uint64_t rows;    // (M,) int64 or 0, as above
  uint64_t y;       // (M, L, C), read: what fwd wrote
  uint64_t rstd;    // (M, L) fp32, read
  uint64_t grad_t;  // (M, L, C), written
  int64_t M, L, C;
  int64_t grad_stride_row, grad_stride_token;
  int64_t dtype;  // mk_dtype of grad, y and grad_t: MK_F32 or MK_BF16
};

// The same normalisation for tokens that are resampled later, after a linear map: y is the sum of taps of n, times
// rstd.
struct mk_feature_norm_centre_args {
  uint64_t x;     // (rows of x, in_h * in_w, C), read
  uint64_t rows;  // (M,) int64 or 0, as above, but none is negative
  uint64_t n;     // (M, in_h * in_w, C), written: x - mean(x), rounded once
  uint64_t rstd;  // (M, out_h * out_w) fp32, written: of the resampled n
  int64_t M, in_h, in_w, out_h, out_w, C;
  int64_t x_stride_row, x_stride_token;
  double eps;
  int64_t dtype;  // mk_dtype of x and n: MK_F32 or MK_BF16
};

MK_API int mk_feature_norm_fwd(const void* args, uint64_t nbytes);
MK_API int mk_feature_norm_centre(const void* args, uint64_t nbytes);
MK_API int mk_feature_norm_bwd(const void* args, uint64_t nbytes);
