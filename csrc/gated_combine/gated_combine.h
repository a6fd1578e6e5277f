// The tokens of one pair, normalised over their channels and weighted: z = gate * (n g + b) with
// n = (x - mean(x)) / sqrt(var(x) + eps). Statistics and everything in between are fp32; z is rounded once.
#pragma once

#include "common/mova_kernels.h"

struct mk_gated_combine_fwd_args {
  uint64_t x;      // (L, I), read
  uint64_t scale;  // (I,) g, read
  uint64_t shift;  // (I,) b, read
  uint64_t z;      // (L, I), written
  int64_t L, I;
  int64_t x_stride_token, z_stride_token;
  double eps, gate;
  int64_t dtype;  // mk_dtype of all of them: MK_F32 or MK_BF16
};

// From dz to the gradients of x, g, b and gate, and z once more. Each of the `parts` sums over tokens covers this many;
// the caller adds them up.
enum { MK_COMBINE_TOKENS_PER_PART = 64 };

struct mk_gated_combine_bwd_args {
  uint64_t x;           // (L, I), read
  uint64_t dz;          // (L, I), read
  uint64_t scale;       // (I,), read
  uint64_t shift;       // (I,), read
  uint64_t grad_x;      // (L, I), written
  uint64_t z;           // (L, I), written
  uint64_t grad_scale;  // (parts, I) fp32, written
  uint64_t grad_shift;  // (parts, I) fp32, written
  uint64_t grad_gate;   // (L,) fp32, written: what each token adds to it
  int64_t L, I;
  int64_t x_stride_token;
  double eps, gate;
  int64_t dtype;  // mk_dtype of all that is not fp32: MK_F32 or MK_BF16
};

// Results do not depend on the number of threads.
MK_API int mk_gated_combine_fwd(const void* args, uint64_t nbytes);
MK_API int mk_gated_combine_bwd(const void* args, uint64_t nbytes);
