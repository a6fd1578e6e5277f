// For loops over the channels of a token, which are compiled once per instruction set.
#pragma once

#include "common/simd.h"

namespace {

// Enough independent sums to hide the latency of an addition.
constexpr int sums = 4;

// body(c, count, i) for the `count` channels from `c` on of every vector; i < sums says to which sum it may add.
// `count` is a constant for all vectors but the last if the body is inlined.
template <class Body>
MK_INLINE void for_each_vector(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + sums * lanes <= channels; c += sums * lanes) {
    MK_UNROLL for (int i = 0; i < sums; ++i) body(c + i * lanes, lanes, i);
  }
  for (; c + lanes <= channels; c += lanes) body(c, lanes, 0);
  if (c < channels) body(c, (int)(channels - c), 0);
}

inline vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp2(x * -1.44269504f)); }

}  // namespace
