// fp32 results per channel, for files that are compiled once per instruction set.
#pragma once

#include "common/simd.h"

namespace {

// The channels of one register in their order, which Format::load may have changed.
template <class Format>
inline void store_in_order(float* p, int count, const vfloat v[Format::parts]) {
  for (int i = 0; i < count; ++i) p[i] = v[i % Format::parts][i / Format::parts];
}

}  // namespace
