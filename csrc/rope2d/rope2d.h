// Rotation of adjacent channel pairs by their token's angle, with fp32 tables that may differ within a pair:
// (a, b) -> (a cos[2k] - b sin[2k], b cos[2k + 1] + a sin[2k + 1]), in fp32 and rounded once; or its adjoint.
#pragma once

#include "common/mova_kernels.h"

struct mk_rope2d_args {
  uint64_t x;         // (B, L, H, D), read
  uint64_t cos, sin;  // (L, D) fp32, read
  uint64_t y;         // (B, L, H, D), written
  int64_t B, L, H, D;
  int64_t x_stride_sample, x_stride_token, x_stride_head;
  int64_t adjoint;  // 0 or 1: x is the gradient of the result, and y the gradient of the input
  int64_t dtype;    // mk_dtype of x and y: MK_F32 or MK_BF16
};

MK_API int mk_rope2d(const void* args, uint64_t nbytes);
