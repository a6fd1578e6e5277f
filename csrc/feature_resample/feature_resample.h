// Bilinear resampling of token grids, channels last: what torch's F.interpolate(mode="bilinear", align_corners=False,
// antialias=False) computes, with the gather of rows in front of it fused in. Weights are fp32 and correctly rounded,
// sums are fp32, and the result is rounded once. A tap of weight 0 still counts, as in torch: 0 * NaN is NaN. An axis
// that keeps its size is copied.
#pragma once

#include "common/mova_kernels.h"

// The longest side of a grid for which all products in taps.h fit in 31 bits.
enum { MK_MAX_GRID_SIDE = 32767 };

struct mk_feature_resample_args {
  uint64_t x;     // (rows of x, in_h * in_w, C); fwd reads it, bwd writes the gradient (M, in_h * in_w, C) to it
  uint64_t rows;  // (M,) int64: the row of x that each row of y shows, negative: zeros; 0: row m shows row m; bwd: 0
  uint64_t y;     // (M, out_h * out_w, C); fwd writes it, bwd reads the gradient from it
  int64_t M, in_h, in_w, out_h, out_w, C;
  int64_t x_stride_row, x_stride_token, y_stride_row, y_stride_token;
  int64_t dtype;  // mk_dtype of x and y; the CPU has no MK_F16
};

struct mk_feature_resample_cuda_args {
  struct mk_feature_resample_args op;
  int64_t device;   // ordinal; made current for the launch only
  uint64_t stream;  // cudaStream_t of that device
};

MK_API int mk_feature_resample_fwd(const void* args, uint64_t nbytes);
MK_API int mk_feature_resample_bwd(const void* args, uint64_t nbytes);
MK_API int mk_feature_resample_cuda_fwd(const void* cuda_args, uint64_t nbytes);
MK_API int mk_feature_resample_cuda_bwd(const void* cuda_args, uint64_t nbytes);
