// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/channels.h"
#include "common/cpu.h"
#include "swiglu_norm/swiglu_norm_cpu.h"

namespace {

template <class type>
inline void clear(type* p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) p[i] = 0;
}

template <class Format>
void norm_token(const mk::SwigluToken& t) {
  typedef typename Format::type type;
  const type *const gate = static_cast<const type*>(t.gate), *const up = static_cast<const type*>(t.up);
  type* const y = static_cast<type*>(t.y);
  vfloat product[mk::max_swiglu_channels / lanes];
  vfloat sum[sums] = {};
  for_each_vector(t.F, [&](int64_t c, int count, int j) __attribute__((always_inline)) {
    const vfloat g = load<Format>(gate + c, count);
    const vfloat p = g * sigmoid(g) * load<Format>(up + c, count);
    product[c / lanes] = p;
    sum[j] += p;
  });
  float mean = total(sum) / (float)t.F;

  // Lanes without a channel must not count.
  for (int64_t c = t.F; c % lanes; ++c) product[c / lanes][c % lanes] = mean;

  // The deviations from a rounded mean have a mean of their own.
  const int64_t filled = (t.F + lanes - 1) / lanes * lanes;
  vfloat deviation[sums] = {}, squares[sums] = {};
  for_each_vector(filled, [&](int64_t c, int, int j) __attribute__((always_inline)) {
    const vfloat v = product[c / lanes] - mean;
    deviation[j] += v;
    squares[j] += v * v;
  });
  const float shift = total(deviation) / (float)t.F;
  const float rstd = inverse_deviation(total(squares) / (float)t.F - shift * shift, t.eps);
  mean += shift;
  *t.mean = mean;
  *t.rstd = rstd;
  for_each_vector(t.F, [&](int64_t c, int count, int) __attribute__((always_inline)) {
    const vfloat weight = load<F32>(t.weight + c, count), bias = load<F32>(t.bias + c, count);
    store<Format>(y + c, count, (product[c / lanes] - mean) * rstd * weight + bias);
  });
  clear(y, t.F, t.width);
}

// With n = (p - mean) * rstd and s = grad * weight, the gradient of p is rstd * (s - mean(s) - n * mean(s * n)).
template <class Format>
void grad_norm_token(const mk::GradSwigluToken& t) {
  typedef typename Format::type type;
  const type *const gate = static_cast<const type*>(t.gate), *const up = static_cast<const type*>(t.up);
  const type* const grad = static_cast<const type*>(t.grad);
  type *const grad_gate = static_cast<type*>(t.grad_gate), *const grad_up = static_cast<type*>(t.grad_up);
  // What is stored is rounded as the means are, where a fused multiply-add would differ: of one channel nothing
  // remains.
  vfloat sigmoids[mk::max_swiglu_channels / lanes];
  vfloat product[mk::max_swiglu_channels / lanes], scaled[mk::max_swiglu_channels / lanes];
  vfloat sum[sums] = {}, along[sums] = {};
  for_each_vector(t.F, [&](int64_t c, int count, int j) __attribute__((always_inline)) {
    const vfloat g = load<Format>(gate + c, count), d = load<Format>(grad + c, count);
    const vfloat sigma = sigmoid(g), p = g * sigma * load<Format>(up + c, count);
    const vfloat n = (p - t.mean) * t.rstd, s = d * load<F32>(t.weight + c, count);
    sigmoids[c / lanes] = sigma;
    product[c / lanes] = p;
    scaled[c / lanes] = s;
    sum[j] += s;
    along[j] += s * n;
    store<F32>(t.sum_weight + c, count, load<F32>(t.sum_weight + c, count) + d * n);
    store<F32>(t.sum_bias + c, count, load<F32>(t.sum_bias + c, count) + d);
  });
  const float mean = total(sum) / (float)t.F, mean_along = total(along) / (float)t.F;
  for_each_vector(t.F, [&](int64_t c, int count, int) __attribute__((always_inline)) {
    const vfloat g = load<Format>(gate + c, count), u = load<Format>(up + c, count);
    const vfloat n = (product[c / lanes] - t.mean) * t.rstd;
    const vfloat grad_p = t.rstd * (scaled[c / lanes] - mean - n * mean_along);
    const vfloat sigma = sigmoids[c / lanes], silu = g * sigma;
    store<Format>(grad_up + c, count, grad_p * silu);
    store<Format>(grad_gate + c, count, grad_p * u * (sigma + silu * (1.0f - sigma)));
  });
  clear(grad_gate, t.F, t.width);
  clear(grad_up, t.F, t.width);
}

}  // namespace

extern const mk::SwigluLoops MK_ISA_NAME(swiglu_norm_loops) = {norm_token<F32>, norm_token<BF16InOrder>,
                                                               grad_norm_token<F32>, grad_norm_token<BF16InOrder>};
