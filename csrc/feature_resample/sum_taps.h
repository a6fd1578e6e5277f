// For loops, which are compiled once per instruction set: resampling as a weighted sum of pixels.
#pragma once

#include "common/channels.h"
#include "feature_resample/feature_resample_cpu.h"

namespace {

// Enough independent sums to hide the latency of a multiply-add.
constexpr int chunks_per_pass = 8;

// Sums, in registers, `chunks` neighbouring chunks of `count` channels from `c` on over all the pixels that pixel
// `x` reads. Lanes beyond `count` become zeros.
template <class Format, int chunks>
inline void sum_taps(const mk::ResampleLine& line, int64_t x, int64_t c, int count,
                     vfloat (&sum)[chunks][Format::parts]) {
  const mk::GatherAxis &h = line.h, &w = line.w;
  const int64_t h_begin = h.begin[line.y], h_end = h.begin[line.y + 1];
  const int64_t w_begin = w.begin[x], w_end = w.begin[x + 1];
  const bool unread = h_begin == h_end || w_begin == w_end;
  // -0 is the neutral element of a sum: a single tap of weight 1 returns -0 as -0.
  const vfloat neutral = (unread ? 0.0f : -0.0f) - vfloat{};
  MK_UNROLL for (int i = 0; i < chunks; ++i) {
    for (int part = 0; part < Format::parts; ++part) sum[i][part] = neutral;
  }
  for (int64_t j = h_begin; j < h_end; ++j) {
    const auto* src = static_cast<const typename Format::type*>(line.src) + h.offset[j] + c;
    for (int64_t k = w_begin; k < w_end; ++k) {
      const float weight = h.weight[j] * w.weight[k];
      MK_UNROLL for (int i = 0; i < chunks; ++i) {
        vfloat value[Format::parts];
        Format::load(src + w.offset[k] + i * Format::width, count, value);
        for (int part = 0; part < Format::parts; ++part) sum[i][part] += weight * value[part];
      }
    }
  }
}

// Calls body(c, count, i, sum) for every register of pixel `x`, the i-th of its block; sum[Format::parts] is its
// result.
template <class Format, class Body>
MK_INLINE void resample(const mk::ResampleLine& line, int64_t x, const Body& body) {
  for_each_block<Format, chunks_per_pass>(line.C, [&](int64_t c, int count, auto chunks) MK_ALWAYS_INLINE {
    vfloat sum[chunks.value][Format::parts];
    sum_taps<Format>(line, x, c, count, sum);
    MK_UNROLL for (int i = 0; i < chunks.value; ++i) body(c + i * Format::width, count, i, sum[i]);
  });
}

}  // namespace
