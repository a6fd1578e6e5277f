// The interface between the driver and the loops.
#pragma once

#include "common/dtype.h"

namespace mk {

struct SwigluToken {
  const void *gate, *up;
  const float *weight, *bias;
  void* y;
  float *mean, *rstd;
  float eps;
  int64_t F, width;
};

struct GradSwigluToken {
  const void *grad, *gate, *up;
  const float* weight;
  float mean, rstd;
  void *grad_gate, *grad_up;
  float *sum_weight, *sum_bias;  // (F,): the token is added to them
  int64_t F, width;
};

struct SwigluLoops {
  ByDtype<void (*)(const SwigluToken&)> norm;
  ByDtype<void (*)(const GradSwigluToken&)> grad;
};

}  // namespace mk
