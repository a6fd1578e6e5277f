// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/layer_norm.h"
#include "gated_combine/gated_combine_cpu.h"

namespace {

constexpr int64_t max_vectors = MK_MAX_NORM_CHANNELS / lanes;

// Channels become fp32 vectors in the order of Format::load. Lanes without a channel hold zeros.
template <class Format>
MK_INLINE void widen(const typename Format::type* p, int64_t channels, vfloat* vectors) {
  for_each_register<Format>(channels, [&](int64_t c, int count) MK_ALWAYS_INLINE {
    vfloat v[Format::parts];
    Format::load(p + c, count, v);
    for (int part = 0; part < Format::parts; ++part) at(vectors, c + part * lanes) = v[part];
  });
}

// x becomes a normalised token in fp32; returns 1 / sqrt(var + eps).
template <class Format>
MK_INLINE float normalise(const typename Format::type* x, int64_t channels, float eps, vfloat* token) {
  constexpr int parts = Format::parts;
  vfloat sum[sums] = {};
  for_each_summand<Format>(channels, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
    vfloat v[parts];
    Format::load(x + c, count, v);
    for (int part = 0; part < parts; ++part) sum[k] += at(token, c + part * lanes) = v[part];
  });
  const Moments m = moments<Format>(token, sum, channels);
  const float rstd = inverse_deviation(m.variance, eps);
  for_each_register<Format>(channels, [&](int64_t c, int) MK_ALWAYS_INLINE {
    for (int part = 0; part < parts; ++part) {
      vfloat& v = at(token, c + part * lanes);
      v = ((v - m.mean) - m.correction) * rstd;
    }
  });
  return rstd;
}

template <class Format>
void weigh(const mk_gated_combine_fwd_args& a, int64_t begin, int64_t end) {
  typedef typename Format::type type;
  vfloat token[max_vectors], scale[max_vectors], shift[max_vectors];
  widen<Format>((const type*)a.scale, a.I, scale);
  widen<Format>((const type*)a.shift, a.I, shift);
  const float gate = (float)a.gate;
  for (int64_t l = begin; l < end; ++l) {
    normalise<Format>((const type*)a.x + l * a.x_stride_token, a.I, (float)a.eps, token);
    type* const z = (type*)a.z + l * a.z_stride_token;
    for_each_register<Format>(a.I, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      vfloat v[Format::parts];
      for (int p = 0; p < Format::parts; ++p) {
        const int64_t i = c + p * lanes;
        v[p] = gate * (at(token, i) * at(scale, i) + at(shift, i));
      }
      Format::store(z + c, count, v);
    });
  }
}

template <class Format>
void grad(const mk_gated_combine_bwd_args& a, int64_t part) {
  typedef typename Format::type type;
  constexpr int parts = Format::parts;
  vfloat token[max_vectors], scale[max_vectors], shift[max_vectors], grad_scale[max_vectors], grad_shift[max_vectors];
  widen<Format>((const type*)a.scale, a.I, scale);
  widen<Format>((const type*)a.shift, a.I, shift);
  const int64_t bytes = (a.I + Format::width - 1) / Format::width * parts * (int64_t)sizeof(vfloat);
  memset(grad_scale, 0, bytes);
  memset(grad_shift, 0, bytes);
  const float gate = (float)a.gate;
  const int64_t begin = part * MK_COMBINE_TOKENS_PER_PART;
  const int64_t end = begin + MK_COMBINE_TOKENS_PER_PART < a.L ? begin + MK_COMBINE_TOKENS_PER_PART : a.L;
  for (int64_t l = begin; l < end; ++l) {
    const float rstd = normalise<Format>((const type*)a.x + l * a.x_stride_token, a.I, (float)a.eps, token);
    const type* const dz = (const type*)a.dz + l * a.I;
    NormGradient gradient;
    vfloat grad_gate[sums] = {};
    for_each_summand<Format>(a.I, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
      vfloat d[parts], z[parts];
      Format::load(dz + c, count, d);
      for (int p = 0; p < parts; ++p) {
        const int64_t i = c + p * lanes;
        const vfloat n = at(token, i), weighted = n * at(scale, i) + at(shift, i);
        gradient.add(d[p] * at(scale, i), n, k);
        grad_gate[k] += d[p] * weighted;
        at(grad_scale, i) += d[p] * n;
        at(grad_shift, i) += d[p];
        z[p] = gate * weighted;
      }
      Format::store((type*)a.z + l * a.I + c, count, z);
    });
    gradient.finish(a.I);
    ((float*)a.grad_gate)[l] = total(grad_gate);
    for_each_register<Format>(a.I, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      vfloat d[parts];
      Format::load(dz + c, count, d);
      for (int p = 0; p < parts; ++p) {
        const int64_t i = c + p * lanes;
        d[p] = gradient.of_input(d[p] * at(scale, i), at(token, i), gate * rstd);
      }
      Format::store((type*)a.grad_x + l * a.I + c, count, d);
    });
  }
  for_each_register<Format>(a.I, [&](int64_t c, int count) MK_ALWAYS_INLINE {
    vfloat of_scale[parts], of_shift[parts];
    for (int p = 0; p < parts; ++p) {
      of_scale[p] = at(grad_scale, c + p * lanes) * gate;
      of_shift[p] = at(grad_shift, c + p * lanes) * gate;
    }
    store_in_order<Format>((float*)a.grad_scale + part * a.I + c, count, of_scale);
    store_in_order<Format>((float*)a.grad_shift + part * a.I + c, count, of_shift);
  });
}

}  // namespace

extern const mk::CombineLoops MK_ISA_NAME(gated_combine_loops) = {{weigh<F32>, weigh<BF16>}, {grad<F32>, grad<BF16>}};
