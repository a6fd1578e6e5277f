// The interface between the driver of matmul and its loops.
#pragma once

#include "common/dtype.h"
#include "common/matmul.h"

namespace mk {

// At most matmul_rows rows of a are packed at a time, in multiples of matmul_row_step; a thread takes matmul_columns
// columns at a time.
constexpr int64_t matmul_rows = 96, matmul_row_step = 6, matmul_columns = 256;

struct MatmulOf {
  int64_t (*left_bytes)(int64_t K);              // of a packed for `matmul_rows` rows
  int64_t (*right_bytes)(int64_t K, int64_t N);  // of b packed
  // Packs columns [begin, end) of b. Both are multiples of matmul_columns, or end is N.
  void (*pack_right)(const mk_matmul_args&, int64_t begin, int64_t end, void* right);
  void (*pack_left)(const mk_matmul_args&, int64_t row, int64_t rows, void* left);
  // Computes `rows` rows and at most matmul_columns columns of c.
  void (*block)(const mk_matmul_args&, const void* left, const void* right, int64_t row, int64_t rows, int64_t column);
};
typedef ByDtype<MatmulOf> MatmulLoops;

}  // namespace mk
