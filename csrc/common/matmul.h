// The matrix product of fp32 or bf16 matrices on a CPU: c = a b + bias + added, with sums in fp32. A sum of more than
// `chain` (common/tile.h) products in fp32 is made of shorter sums. In fp32, adding bias and added rounds c once each;
// in bf16, c is rounded once in all. Where the processor has no products of bf16, they are widened to fp32.
#pragma once

#include "common/mova_kernels.h"

// The stride of a column of added and c is 1.
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

// The result does not depend on the number of threads.
MK_API int mk_matmul(const void* args, uint64_t nbytes);
