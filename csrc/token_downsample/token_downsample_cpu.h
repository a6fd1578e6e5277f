// The interface between the driver and the loops.
#pragma once

#include "common/dtype.h"

namespace mk {

// One line of the written tensor; the fields of mk_token_downsample_args for its sample.
struct StageLine {
  const void *x, *grad, *outer;
  const float *weight, *bias, *taps, *gate, *grad_mean;
  void* y;
  float* sums;  // of this line
  int64_t line, R, C, outer_stride_token, window;
  float eps;
};

typedef ByDtype<void (*)(const StageLine&)> StageStep;
struct StageLoops {
  StageStep norm_silu, conv, norm_add, norm_add_bwd, gate_bwd, norm_silu_bwd, conv_bwd, add_bwd;
};

}  // namespace mk
