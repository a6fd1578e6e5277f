// The steps besides matrix products of a projection with a folded affine part and of its gradient:
// y = (x g + b) W^T + c = x V^T + ... with V = W diag(g).
#pragma once

#include "common/mova_kernels.h"

struct mk_ragged_linear_sum_args {
  uint64_t x;    // (R, C), read
  uint64_t sum;  // (C,) fp32, written: the sum over R
  int64_t R, C;
  int64_t x_stride_row;
  int64_t dtype;  // mk_dtype of x: MK_F32 or MK_BF16
};

// From dV and total, the sum of dy: dW = dV diag(g) + total b^T, dg_c = sum_o dV_oc W_oc, db = W^T total.
struct mk_ragged_linear_unfold_args {
  uint64_t grad_folded;  // (O, C) dV, read
  uint64_t weight;       // (O, C) W, read
  uint64_t total;        // (O,) fp32, read
  uint64_t scale;        // (C,) g, read
  uint64_t shift;        // (C,) b, read
  uint64_t grad_weight;  // (O, C) dW, written
  uint64_t grad_scale;   // (C,) fp32 dg, written
  uint64_t grad_shift;   // (C,) fp32 db, written
  int64_t O, C;
  int64_t grad_folded_stride_row, weight_stride_row;
  int64_t dtype;  // mk_dtype of all that is not fp32: MK_F32 or MK_BF16
};

// Resampling after a projection: y = scale * (the sum of taps of x as in feature_resample.h) + shift.
struct mk_ragged_linear_resample_args {
  uint64_t x;      // (M, in_h * in_w, C), read
  uint64_t scale;  // (M, out_h * out_w) fp32, read
  uint64_t shift;  // (C,) fp32, read
  uint64_t y;      // (M, out_h * out_w, C), written; rounded once
  int64_t M, in_h, in_w, out_h, out_w, C;
  int64_t dtype;  // mk_dtype of x and y: MK_F32 or MK_BF16
};

// Sums do not depend on the number of threads.
MK_API int mk_ragged_linear_sum(const void* args, uint64_t nbytes);
MK_API int mk_ragged_linear_resample(const void* args, uint64_t nbytes);
MK_API int mk_ragged_linear_unfold(const void* args, uint64_t nbytes);
