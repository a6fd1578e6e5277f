// What the kernels know about data types: the size of an element, bf16 numbers one at a time, one function per type.
#pragma once

#include <string.h>

#include "common/mova_kernels.h"

namespace mk {

inline int64_t itemsize(int64_t dtype) { return dtype == MK_F32 ? 4 : 2; }

// The same function for either data type that the CPU library takes.
template <class Function>
struct ByDtype {
  Function f32, bf16;
  const Function& operator[](int64_t dtype) const { return dtype == MK_F32 ? f32 : bf16; }
};

// For code that is not vectorised. A bf16 is the upper half of an fp32.
inline float to_float(float v) { return v; }
inline float to_float(uint16_t bf16) {
  const uint32_t bits = (uint32_t)bf16 << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

inline void from_float(float v, float* result) { *result = v; }
// Rounds to nearest, ties to even. The carry could turn a NaN into an infinity.
inline void from_float(float v, uint16_t* result) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  *result = (uint16_t)(v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace mk
