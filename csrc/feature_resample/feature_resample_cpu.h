// The interface between the driver and the loops. Forward and backward are the same sum with other tables.
#pragma once

#include "common/dtype.h"

namespace mk {

// Position p of the written tensor is the sum over k in [begin[p], begin[p + 1]) of weight[k] times what the read
// tensor has `offset[k]` elements from its start.
struct GatherAxis {
  const int64_t* begin;
  const int64_t* offset;
  const float* weight;
};

// One line of pixels of one row.
struct ResampleLine {
  const void* src;  // the row's first element
  GatherAxis h, w;
  int64_t y, width, C;  // the line, its pixels, their channels
  void* dst;            // the line's first element
  int64_t dst_stride;   // elements from pixel to pixel
};

typedef ByDtype<void (*)(const ResampleLine&)> ResampleLoops;

}  // namespace mk
