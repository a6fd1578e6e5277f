// What the driver hands to the loops.
#pragma once

#include <stdint.h>

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
  void (*f32)(const RopeToken&);
  void (*bf16)(const RopeToken&);
  void (*adjoint_f32)(const RopeToken&);
  void (*adjoint_bf16)(const RopeToken&);
};

}  // namespace mk
