// The interface between the driver and the loops.
#pragma once

#include "feature_resample/feature_resample_cpu.h"

namespace mk {

// One line of pixels of one row.
struct NormLine {
  ResampleLine resample;
  float* rstd;  // of the line's first pixel
  float eps;
};

struct CentreTokens {
  const void* x;
  int64_t x_stride;  // elements from token to token
  void* n;
  int64_t tokens, C;
};

// Neighbouring tokens of one row.
struct GradNormTokens {
  const void* grad;
  int64_t grad_stride;  // elements from token to token
  const void* y;
  const float* rstd;
  void* grad_t;
  int64_t tokens, C;
};

struct NormLoops {
  ByDtype<void (*)(const NormLine&)> norm, rstd;  // rstd does not write the line
  ByDtype<void (*)(const CentreTokens&)> centre;
  ByDtype<void (*)(const GradNormTokens&)> grad;
};

}  // namespace mk
