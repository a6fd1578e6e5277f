// The interface between the driver and the loops.
#pragma once

#include "common/dtype.h"
#include "feature_resample/feature_resample_cpu.h"
#include "ragged_linear/ragged_linear.h"

namespace mk {

// This many columns are summed in registers at once: four cache lines of fp32 or two of bf16.
constexpr int64_t columns_per_block = 64;

// One line of pixels of one row.
struct ScaledLine {
  ResampleLine resample;
  const float* scale;  // of the line's first pixel
  const float* shift;
};

struct RaggedLinearLoops {
  // Sum and unfold take the columns [begin, end).
  ByDtype<void (*)(const mk_ragged_linear_sum_args&, int64_t begin, int64_t end)> sum;
  ByDtype<void (*)(const mk_ragged_linear_unfold_args&, int64_t begin, int64_t end)> unfold;
  ByDtype<void (*)(const ScaledLine&)> resample;
};

}  // namespace mk
