// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/layer_norm.h"
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
  vfloat product[MK_MAX_NORM_CHANNELS / lanes];
  vfloat sum[sums] = {};
  for_each_summand<Format>(t.F, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
    const vfloat g = load<Format>(gate + c, count);
    sum[k] += at(product, c) = g * sigmoid(g) * load<Format>(up + c, count);
  });
  const Moments m = moments<Format>(product, sum, t.F);
  const float mean = m.mean + m.correction, rstd = inverse_deviation(m.variance, t.eps);
  *t.mean = mean;
  *t.rstd = rstd;
  for_each_register<Format>(t.F, [&](int64_t c, int count) MK_ALWAYS_INLINE {
    const vfloat weight = load<F32>(t.weight + c, count), bias = load<F32>(t.bias + c, count);
    store<Format>(y + c, count, (at(product, c) - mean) * rstd * weight + bias);
  });
  clear(y, t.F, t.width);
}

template <class Format>
void grad_norm_token(const mk::GradSwigluToken& t) {
  typedef typename Format::type type;
  const type *const gate = static_cast<const type*>(t.gate), *const up = static_cast<const type*>(t.up);
  const type* const grad = static_cast<const type*>(t.grad);
  type *const grad_gate = static_cast<type*>(t.grad_gate), *const grad_up = static_cast<type*>(t.grad_up);
  // All three are stored: computed again, they could be rounded differently, and the gradient of a single channel,
  // which is 0, would not be.
  vfloat sigmoids[MK_MAX_NORM_CHANNELS / lanes];
  vfloat product[MK_MAX_NORM_CHANNELS / lanes], scaled[MK_MAX_NORM_CHANNELS / lanes];
  NormGradient gradient;
  for_each_summand<Format>(t.F, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
    const vfloat g = load<Format>(gate + c, count), d = load<Format>(grad + c, count);
    const vfloat sigma = sigmoid(g), p = g * sigma * load<Format>(up + c, count);
    const vfloat n = (p - t.mean) * t.rstd, s = d * load<F32>(t.weight + c, count);
    at(sigmoids, c) = sigma;
    at(product, c) = p;
    at(scaled, c) = s;
    gradient.add(s, n, k);
    store<F32>(t.sum_weight + c, count, load<F32>(t.sum_weight + c, count) + d * n);
    store<F32>(t.sum_bias + c, count, load<F32>(t.sum_bias + c, count) + d);
  });
  gradient.finish(t.F);
  for_each_register<Format>(t.F, [&](int64_t c, int count) MK_ALWAYS_INLINE {
    const vfloat g = load<Format>(gate + c, count), u = load<Format>(up + c, count);
    const vfloat n = (at(product, c) - t.mean) * t.rstd;
    const vfloat grad_p = gradient.of_input(at(scaled, c), n, t.rstd);
    const vfloat sigma = at(sigmoids, c), silu = g * sigma;
    store<Format>(grad_up + c, count, grad_p * silu);
    store<Format>(grad_gate + c, count, grad_p * u * (sigma + silu * (1.0f - sigma)));
  });
  clear(grad_gate, t.F, t.width);
  clear(grad_up, t.F, t.width);
}

}  // namespace

extern const mk::SwigluLoops MK_ISA_NAME(swiglu_norm_loops) = {{norm_token<F32>, norm_token<BF16InOrder>},
                                                               {grad_norm_token<F32>, grad_norm_token<BF16InOrder>}};
