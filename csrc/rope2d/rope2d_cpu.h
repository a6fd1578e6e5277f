// The interface between the driver and the loops.
#pragma once

#include "common/dtype.h"

namespace mk {

// All heads of one token.
struct RopeToken {
  const void* x;
  int64_t x_stride;  // elements from head to head
  const float *cos, *sin;
  void* y;
  int64_t H, D;
};

struct RopeLoops {
  ByDtype<void (*)(const RopeToken&)> rotate, adjoint;
};

}  // namespace mk
