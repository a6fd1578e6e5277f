// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/simd.h"
#include "feature_resample/feature_resample_cpu.h"

namespace {

// Enough independent sums to hide the latency of a multiply-add.
constexpr int chunks_per_pass = 8;

// `chunks` neighbouring chunks of `count` channels of one pixel, summed in registers over all the pixels it reads.
template <class Format, int chunks>
inline void sum_taps(const mk::ResampleLine& line, int64_t x, int64_t c, int count, typename Format::type* dst) {
  const mk::GatherAxis &h = line.h, &w = line.w;
  const int64_t h_begin = h.begin[line.y], h_end = h.begin[line.y + 1];
  const int64_t w_begin = w.begin[x], w_end = w.begin[x + 1];
  const bool unread = h_begin == h_end || w_begin == w_end;
  // -0 is the neutral element of a sum: a single tap of weight 1 returns -0 as -0.
  const vfloat neutral = (unread ? 0.0f : -0.0f) - vfloat{};
  vfloat sum[chunks][Format::parts];
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
  MK_UNROLL for (int i = 0; i < chunks; ++i) Format::store(dst + c + i * Format::width, count, sum[i]);
}

template <class Format>
void resample_line(const mk::ResampleLine& line) {
  constexpr int width = Format::width, pass = chunks_per_pass * width;
  for (int64_t x = 0; x < line.width; ++x) {
    auto* dst = static_cast<typename Format::type*>(line.dst) + x * line.dst_stride;
    int64_t c = 0;
    for (; c + pass <= line.C; c += pass) sum_taps<Format, chunks_per_pass>(line, x, c, width, dst);
    for (; c + width <= line.C; c += width) sum_taps<Format, 1>(line, x, c, width, dst);
    if (c < line.C) sum_taps<Format, 1>(line, x, c, (int)(line.C - c), dst);
  }
}

}  // namespace

extern const mk::ResampleLoops MK_ISA_NAME(feature_resample_loops) = {resample_line<F32>, resample_line<BF16>};
