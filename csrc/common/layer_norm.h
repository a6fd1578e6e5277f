// LayerNorm of a token whose channels are in fp32 vectors, in the order of Format::load. For loops, which are compiled
// once per instruction set.
#pragma once

#include "common/channels.h"

namespace {

struct Moments {
  float mean, correction;  // The mean is the sum of both: `mean` alone is off by its rounding error.
  float variance;          // biased
};

// Computes the moments of a token, given the sums of its channels, and writes the mean to lanes without a channel.
template <class Format>
MK_INLINE Moments moments(vfloat* token, const vfloat (&sum)[sums], int64_t channels) {
  constexpr int width = Format::width, parts = Format::parts;
  const float mean = total(sum) / (float)channels;
  if (const int rest = (int)(channels % width)) {
    for (int part = 0; part < parts; ++part) {
      vfloat& last = at(token, channels - rest + part * lanes);
      last = lane_numbers() * parts + part < vuint{} + rest ? last : vfloat{} + mean;
    }
  }
  // The second pass sums deviations from the rounded mean, in segments: the error of a sum grows with its length.
  constexpr int64_t segment = 1024;
  const int64_t filled = (channels + width - 1) / width * width;
  float deviations = 0, variance = 0;
  for (int64_t first = 0; first < filled; first += segment) {
    vfloat deviation[sums] = {}, squares[sums] = {};
    for_each_summand<F32>(filled - first < segment ? filled - first : segment,
                          [&](int64_t c, int, int k) MK_ALWAYS_INLINE {
                            const vfloat v = at(token, first + c) - mean;
                            deviation[k] += v;
                            squares[k] += v * v;
                          });
    deviations += total(deviation);
    variance += total(squares) / (float)channels;
  }
  const float correction = deviations / (float)channels;
  return {mean, correction, variance - correction * correction};
}

// Returns 1 / sqrt(variance + eps), or NaN if the squares of a token overflowed: 0 would make it a token of zeros.
inline float inverse_deviation(float variance, float eps) {
  return 1 / __builtin_sqrtf(variance + eps) + (variance - variance);
}

// The gradient of LayerNorm's input x from that of n = (x - mean) * rstd, `grad`:
//     rstd * (grad - mean(grad) - n * mean(grad * n)).
// add() takes every vector, with zeros in `grad` where a lane has no channel; then finish(); then of_input().
struct NormGradient {
  vfloat sum[sums] = {}, along[sums] = {};
  float mean, mean_along;

  MK_INLINE void add(vfloat grad, vfloat n, int k) {
    sum[k] += grad;
    along[k] += grad * n;
  }
  MK_INLINE void finish(int64_t channels) {
    mean = total(sum) / (float)channels;
    mean_along = total(along) / (float)channels;
  }
  MK_INLINE vfloat of_input(vfloat grad, vfloat n, float rstd) const { return rstd * (grad - mean - n * mean_along); }
};

}  // namespace
