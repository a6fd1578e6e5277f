// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "feature_resample/sum_taps.h"

namespace {

template <class Format, int chunks>
inline void resample(const mk::ResampleLine& line, int64_t x, int64_t c, int count, typename Format::type* dst) {
  vfloat sum[chunks][Format::parts];
  sum_taps<Format>(line, x, c, count, sum);
  MK_UNROLL for (int i = 0; i < chunks; ++i) Format::store(dst + c + i * Format::width, count, sum[i]);
}

template <class Format>
void resample_line(const mk::ResampleLine& line) {
  constexpr int width = Format::width, pass = chunks_per_pass * width;
  for (int64_t x = 0; x < line.width; ++x) {
    auto* dst = static_cast<typename Format::type*>(line.dst) + x * line.dst_stride;
    int64_t c = 0;
    for (; c + pass <= line.C; c += pass) resample<Format, chunks_per_pass>(line, x, c, width, dst);
    for (; c + width <= line.C; c += width) resample<Format, 1>(line, x, c, width, dst);
    if (c < line.C) resample<Format, 1>(line, x, c, (int)(line.C - c), dst);
  }
}

}  // namespace

extern const mk::ResampleLoops MK_ISA_NAME(feature_resample_loops) = {resample_line<F32>, resample_line<BF16>};
