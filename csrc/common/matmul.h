// The matrix product of fp32 or bf16 matrices on a CPU: c = a b + bias + added, with sums in fp32. fp32 sums of more
// than `chain` (common/tile.h) products consist of shorter ones. c is rounded once more for bias and once for added in
// fp32, once in all in bf16. bf16 is multiplied as such where the processor can do it and widened where it cannot.
#pragma once

#include "common/mova_kernels.h"

// Every field has 8 bytes. Strides are in elements; the stride of a column of added and c is 1.
struct mk_matmul_args {
  uint64_t a;      // (M, K), read
  uint64_t b;      // (K, N), read
  uint64_t bias;   // (N,), contiguous, read; 0: none
  uint64_t added;  // (M, N), read; 0: none. May be c itself
  uint64_t c;      // (M, N), written
  int64_t M, N, K;
  int64_t a_stride_row, a_stride_column, b_stride_row, b_stride_column, added_stride_row, c_stride_row;
  int64_t dtype;  // MK_F32 or MK_BF16, of all matrices
};

// Returns an mk_status; `nbytes` is the size of the block above. The result does not depend on the number of threads.
MK_API int mk_matmul(const void* args, uint64_t nbytes);
