// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "feature_resample/sum_taps.h"

namespace {

template <class Format>
void resample_line(const mk::ResampleLine& line) {
  for (int64_t x = 0; x < line.width; ++x) {
    auto* const dst = static_cast<typename Format::type*>(line.dst) + x * line.dst_stride;
    resample<Format>(line, x, [&](int64_t c, int count, int, const vfloat* sum) MK_ALWAYS_INLINE {
      Format::store(dst + c, count, sum);
    });
  }
}

}  // namespace

extern const mk::ResampleLoops MK_ISA_NAME(feature_resample_loops) = {resample_line<F32>, resample_line<BF16>};
