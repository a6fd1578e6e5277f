// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "feature_norm/feature_norm_cpu.h"
#include "feature_resample/sum_taps.h"

namespace {

// Enough independent sums to hide the latency of an addition.
constexpr int sums = 4;

// Resamples `chunks` chunks from channel `c` into the token and adds them to the sum.
template <class Format, int chunks>
inline void resample(const mk::ResampleLine& line, int64_t x, int64_t c, int count, vfloat* token,
                     vfloat (&sum)[sums]) {
  constexpr int parts = Format::parts;
  vfloat y[chunks][parts];
  sum_taps<Format>(line, x, c, count, y);
  MK_UNROLL for (int i = 0; i < chunks; ++i) {
    for (int part = 0; part < parts; ++part) {
      token[c / lanes + i * parts + part] = y[i][part];
      sum[(i * parts + part) % sums] += y[i][part];
    }
  }
}

inline void add_deviation(vfloat v, vfloat& sum, vfloat& squares) {
  sum += v;
  squares += v * v;
}

template <class Format>
inline void store_norm(const vfloat* token, float mean, float rstd, typename Format::type* dst, int count) {
  vfloat y[Format::parts];
  for (int part = 0; part < Format::parts; ++part) y[part] = (token[part] - mean) * rstd;
  Format::store(dst, count, y);
}

// A token's vectors lie in the order of Format::load, which neither its statistics nor Format::store mind.
template <class Format, bool writes>
void norm_line(const mk::NormLine& line) {
  constexpr int width = Format::width, parts = Format::parts, pass = chunks_per_pass * width;
  const int64_t C = line.resample.C, whole = C - C % width;
  const int rest = (int)(C - whole);
  const int64_t vectors = (whole + (rest ? width : 0)) / lanes;
  vfloat token[mk::max_norm_channels / lanes];
  for (int64_t x = 0; x < line.resample.width; ++x) {
    vfloat sum[sums] = {};
    int64_t c = 0;
    for (; c + pass <= C; c += pass) resample<Format, chunks_per_pass>(line.resample, x, c, width, token, sum);
    for (; c < whole; c += width) resample<Format, 1>(line.resample, x, c, width, token, sum);
    if (rest) resample<Format, 1>(line.resample, x, c, rest, token, sum);
    float mean = total(sum) / (float)C;

    // Lanes without a channel must not count: lane k of a part holds channel k * parts + part of the rest.
    for (int part = 0; rest && part < parts; ++part) {
      for (int k = 0; k < lanes; ++k) {
        if (k * parts + part >= rest) token[whole / lanes + part][k] = mean;
      }
    }

    // The deviations from a rounded mean have a mean of their own.
    vfloat deviation[sums] = {}, squares[sums] = {};
    int64_t i = 0;
    for (; i + sums <= vectors; i += sums) {
      MK_UNROLL for (int j = 0; j < sums; ++j) add_deviation(token[i + j] - mean, deviation[j], squares[j]);
    }
    for (; i < vectors; ++i) add_deviation(token[i] - mean, deviation[0], squares[0]);
    const float shift = total(deviation) / (float)C;
    const float rstd = inverse_deviation(total(squares) / (float)C - shift * shift, line.eps);
    mean += shift;

    line.rstd[x] = rstd;
    if (!writes) continue;
    auto* dst = static_cast<typename Format::type*>(line.resample.dst) + x * line.resample.dst_stride;
    for (c = 0; c < whole; c += width) store_norm<Format>(token + c / lanes, mean, rstd, dst + c, width);
    if (rest) store_norm<Format>(token + c / lanes, mean, rstd, dst + c, rest);
  }
}

template <class Format>
inline void add_deviations(const typename Format::type* x, int count, float mean, vfloat& sum) {
  vfloat v[Format::parts];
  Format::load(x, count, v);
  for (int part = 0; part < Format::parts; ++part) sum += v[part] - mean;
  if (count < Format::width) sum[0] += (float)(Format::width - count) * mean;  // lanes without a channel held zeros
}

template <class Format>
inline void store_deviations(const typename Format::type* x, int count, float mean, float shift,
                             typename Format::type* n) {
  vfloat v[Format::parts];
  Format::load(x, count, v);
  for (int part = 0; part < Format::parts; ++part) v[part] = (v[part] - mean) - shift;
  Format::store(n, count, v);
}

template <class Format>
void centre_tokens(const mk::CentreTokens& t) {
  typedef typename Format::type type;
  constexpr int width = Format::width;
  const int64_t whole = t.C - t.C % width;
  const int rest = (int)(t.C - whole);
  for (int64_t i = 0; i < t.tokens; ++i) {
    const type* const x = static_cast<const type*>(t.x) + i * t.x_stride;
    type* const n = static_cast<type*>(t.n) + i * t.C;
    float mean = 0, shift = 0;
    for (int pass = 0; pass < 2; ++pass) {  // the deviations from a rounded mean have a mean of their own
      vfloat sum[sums] = {};
      mean = shift;
      for (int64_t c = 0; c < whole; c += width) add_deviations<Format>(x + c, width, mean, sum[c / width % sums]);
      if (rest) add_deviations<Format>(x + whole, rest, mean, sum[0]);
      shift = total(sum) / (float)t.C;
    }
    for (int64_t c = 0; c < whole; c += width) store_deviations<Format>(x + c, width, mean, shift, n + c);
    if (rest) store_deviations<Format>(x + whole, rest, mean, shift, n + whole);
  }
}

template <class Format>
inline void add_products(const typename Format::type* grad, const typename Format::type* y, int count, vfloat& sum,
                         vfloat& along) {
  vfloat g[Format::parts], n[Format::parts];
  Format::load(grad, count, g);
  Format::load(y, count, n);
  for (int part = 0; part < Format::parts; ++part) {
    sum += g[part];
    along += g[part] * n[part];
  }
}

template <class Format>
inline void store_grad(const typename Format::type* grad, const typename Format::type* y, int count, float mean,
                       float along, float rstd, typename Format::type* dst) {
  vfloat g[Format::parts], n[Format::parts];
  Format::load(grad, count, g);
  Format::load(y, count, n);
  for (int part = 0; part < Format::parts; ++part) g[part] = rstd * (g[part] - mean - n[part] * along);
  Format::store(dst, count, g);
}

template <class Format>
void grad_norm_tokens(const mk::GradNormTokens& t) {
  typedef typename Format::type type;
  constexpr int width = Format::width, pass = sums * width;
  for (int64_t i = 0; i < t.tokens; ++i) {
    const type* const grad = static_cast<const type*>(t.grad) + i * t.grad_stride;
    const type* const y = static_cast<const type*>(t.y) + i * t.C;
    type* const dst = static_cast<type*>(t.grad_t) + i * t.C;
    vfloat sum[sums] = {}, along[sums] = {};
    int64_t c = 0;
    for (; c + pass <= t.C; c += pass) {
      MK_UNROLL for (int j = 0; j < sums; ++j) {
        add_products<Format>(grad + c + j * width, y + c + j * width, width, sum[j], along[j]);
      }
    }
    for (; c + width <= t.C; c += width) add_products<Format>(grad + c, y + c, width, sum[0], along[0]);
    if (c < t.C) add_products<Format>(grad + c, y + c, (int)(t.C - c), sum[0], along[0]);

    const float mean = total(sum) / (float)t.C, mean_along = total(along) / (float)t.C, rstd = t.rstd[i];
    for (c = 0; c + width <= t.C; c += width) {
      store_grad<Format>(grad + c, y + c, width, mean, mean_along, rstd, dst + c);
    }
    if (c < t.C) store_grad<Format>(grad + c, y + c, (int)(t.C - c), mean, mean_along, rstd, dst + c);
  }
}

}  // namespace

extern const mk::NormLoops MK_ISA_NAME(feature_norm_loops) = {
    norm_line<F32, true>, norm_line<BF16, true>, norm_line<F32, false>, norm_line<BF16, false>,
    centre_tokens<F32>,   centre_tokens<BF16>,   grad_norm_tokens<F32>, grad_norm_tokens<BF16>};
