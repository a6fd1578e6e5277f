// For loops, which are compiled once per instruction set: the rotation of channel pairs.
#pragma once

#include "common/simd.h"

namespace {

typedef uint64_t vpairs __attribute__((vector_size(vector_bytes)));

// (a, b) -> (b, a) in every pair of lanes: a rotation of 64-bit lanes needs no shuffle.
inline vfloat swap_pairs(vfloat v) {
  const vpairs pairs = (vpairs)v;
  return (vfloat)(pairs << 32 | pairs >> 32);
}

// Rotates the pairs (a, b) -> (a cos - b sin, b cos + a sin), where each lane of the result has its own cos and sin;
// or computes the adjoint.
template <bool adjoint>
inline vfloat rotate(vfloat x, vfloat cos, vfloat sin) {
  vfloat cross = (vfloat)((vpairs)sin ^ 0x80000000u);  // -sin in even lanes, the low halves; little-endian only
  if (adjoint) cross = swap_pairs(cross);
  return x * cos + swap_pairs(x) * cross;
}

}  // namespace
