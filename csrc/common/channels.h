// Iteration over the channels of a token, for loops that are compiled once per instruction set.
#pragma once

#include "common/simd.h"

namespace {

// A number that a lambda knows at compile time.
template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls body(c, count, Constant<m>) for m neighbouring registers of `count` channels each, from channel c on: for
// blocks of n registers, then for single ones, then for the rest of the channels. `count` is a constant for all but the
// rest.
template <class Format, int n, class Body>
MK_INLINE void for_each_block(int64_t channels, const Body& body) {
  constexpr int width = Format::width;
  int64_t c = 0;
  for (; c + n * width <= channels; c += n * width) body(c, width, Constant<n>{});
  for (; n > 1 && c + width <= channels; c += width) body(c, width, Constant<1>{});
  if (c < channels) body(c, (int)(channels - c), Constant<1>{});
}

// Returns the vector that begins with channel c, a multiple of `lanes`, in an array of vectors for all channels.
template <class Vector>
MK_INLINE Vector& at(Vector* vectors, int64_t c) {
  return *(Vector*)((char*)vectors + c * (int64_t)sizeof(float));
}

// This many independent sums hide the latency of an addition.
constexpr int sums = 4;

// Calls body(c, count, k) for every register, which may add to sum number k < sums.
template <class Format, class Body>
MK_INLINE void for_each_summand(int64_t channels, const Body& body) {
  for_each_block<Format, sums>(channels, [&](int64_t c, int count, auto registers) MK_ALWAYS_INLINE {
    MK_UNROLL for (int k = 0; k < registers.value; ++k) body(c + k * Format::width, count, k);
  });
}

// Calls body(c, count) for every register.
template <class Format, class Body>
MK_INLINE void for_each_register(int64_t channels, const Body& body) {
  for_each_summand<Format>(channels, [&](int64_t c, int count, int) MK_ALWAYS_INLINE { body(c, count); });
}

// Stores the first `count` channels of a register in the order of memory, which Format::load may have changed.
template <class Format>
inline void store_in_order(float* p, int count, const vfloat v[Format::parts]) {
  for (int i = 0; i < count; ++i) p[i] = v[i % Format::parts][i / Format::parts];
}

inline vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp2(x * -log2e)); }

}  // namespace
