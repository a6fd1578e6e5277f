// What the driver hands to the loops.
#pragma once

#include <stdint.h>

#include "ragged_linear/ragged_linear.h"

namespace mk {

// The columns that are summed in registers at once: four cache lines of fp32 or two of bf16.
constexpr int64_t columns_per_block = 64;

// Each takes the columns [begin, end).
struct UnfoldLoops {
  void (*sum_f32)(const mk_ragged_linear_sum_args&, int64_t begin, int64_t end);
  void (*sum_bf16)(const mk_ragged_linear_sum_args&, int64_t begin, int64_t end);
  void (*unfold_f32)(const mk_ragged_linear_unfold_args&, int64_t begin, int64_t end);
  void (*unfold_bf16)(const mk_ragged_linear_unfold_args&, int64_t begin, int64_t end);
};

}  // namespace mk
