// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/layer_norm.h"
#include "feature_norm/feature_norm_cpu.h"
#include "feature_resample/sum_taps.h"

namespace {

template <class Format, bool writes>
void norm_line(const mk::NormLine& line) {
  constexpr int parts = Format::parts;
  const int64_t C = line.resample.C;
  vfloat token[MK_MAX_NORM_CHANNELS / lanes];
  for (int64_t x = 0; x < line.resample.width; ++x) {
    vfloat sum[sums] = {};
    resample<Format>(line.resample, x, [&](int64_t c, int, int i, const vfloat* y) MK_ALWAYS_INLINE {
      for (int part = 0; part < parts; ++part) {
        at(token, c + part * lanes) = y[part];
        sum[(i * parts + part) % sums] += y[part];
      }
    });
    const Moments m = moments<Format>(token, sum, C);
    const float mean = m.mean + m.correction, rstd = inverse_deviation(m.variance, line.eps);
    line.rstd[x] = rstd;
    if (!writes) continue;
    auto* const dst = static_cast<typename Format::type*>(line.resample.dst) + x * line.resample.dst_stride;
    for_each_register<Format>(C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      vfloat y[parts];
      for (int part = 0; part < parts; ++part) y[part] = (at(token, c + part * lanes) - mean) * rstd;
      Format::store(dst + c, count, y);
    });
  }
}

template <class Format>
void centre_tokens(const mk::CentreTokens& t) {
  typedef typename Format::type type;
  constexpr int parts = Format::parts;
  vfloat token[MK_MAX_NORM_CHANNELS / lanes];
  for (int64_t i = 0; i < t.tokens; ++i) {
    const type* const x = static_cast<const type*>(t.x) + i * t.x_stride;
    type* const n = static_cast<type*>(t.n) + i * t.C;
    vfloat sum[sums] = {};
    for_each_summand<Format>(t.C, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
      vfloat v[parts];
      Format::load(x + c, count, v);
      for (int part = 0; part < parts; ++part) sum[k] += at(token, c + part * lanes) = v[part];
    });
    const Moments m = moments<Format>(token, sum, t.C);
    for_each_register<Format>(t.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      vfloat v[parts];
      for (int part = 0; part < parts; ++part) v[part] = (at(token, c + part * lanes) - m.mean) - m.correction;
      Format::store(n + c, count, v);
    });
  }
}

template <class Format>
void grad_norm_tokens(const mk::GradNormTokens& t) {
  typedef typename Format::type type;
  constexpr int parts = Format::parts;
  for (int64_t i = 0; i < t.tokens; ++i) {
    const type* const grad = static_cast<const type*>(t.grad) + i * t.grad_stride;
    const type* const y = static_cast<const type*>(t.y) + i * t.C;
    type* const dst = static_cast<type*>(t.grad_t) + i * t.C;
    NormGradient gradient;
    for_each_summand<Format>(t.C, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
      vfloat g[parts], n[parts];
      Format::load(grad + c, count, g);
      Format::load(y + c, count, n);
      for (int part = 0; part < parts; ++part) gradient.add(g[part], n[part], k);
    });
    gradient.finish(t.C);
    for_each_register<Format>(t.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      vfloat g[parts], n[parts];
      Format::load(grad + c, count, g);
      Format::load(y + c, count, n);
      for (int part = 0; part < parts; ++part) g[part] = gradient.of_input(g[part], n[part], t.rstd[i]);
      Format::store(dst + c, count, g);
    });
  }
}

}  // namespace

extern const mk::NormLoops MK_ISA_NAME(feature_norm_loops) = {{norm_line<F32, true>, norm_line<BF16, true>},
                                                              {norm_line<F32, false>, norm_line<BF16, false>},
                                                              {centre_tokens<F32>, centre_tokens<BF16>},
                                                              {grad_norm_tokens<F32>, grad_norm_tokens<BF16>}};
