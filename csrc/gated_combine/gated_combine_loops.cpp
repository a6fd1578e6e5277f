// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/columns.h"
#include "common/cpu.h"
#include "gated_combine/gated_combine_cpu.h"

namespace {

// Enough independent sums to hide the latency of an addition.
constexpr int sums = 4;
constexpr int64_t max_vectors = mk::max_combine_channels / lanes;

// body(c, i, count, k): channels [c, c + count), whose vectors begin at i; sum number k takes them.
template <class Format, class Body>
MK_INLINE void over_channels(int64_t channels, const Body& body) {
  constexpr int width = Format::width, pass = sums * width;
  int64_t c = 0;
  for (; c + pass <= channels; c += pass) {
    MK_UNROLL for (int k = 0; k < sums; ++k) body(c + k * width, c / lanes + k * Format::parts, width, k);
  }
  for (; c + width <= channels; c += width) body(c, c / lanes, width, 0);
  if (c < channels) body(c, c / lanes, (int)(channels - c), 0);
}

// Vectors of channels in fp32, in the order of Format::load. Lanes without a channel hold zeros.
template <class Format>
MK_INLINE void widen(const typename Format::type* p, int64_t channels, vfloat* v) {
  over_channels<Format>(channels, [&](int64_t c, int64_t i, int count, int) { Format::load(p + c, count, v + i); });
}

// A token becomes its normalised self; returns 1 / sqrt(var + eps). Lanes without a channel become zeros.
template <class Format>
MK_INLINE float normalise(const typename Format::type* x, int64_t channels, float eps, vfloat* token) {
  constexpr int parts = Format::parts;
  vfloat sum[sums] = {};
  over_channels<Format>(channels, [&](int64_t c, int64_t i, int count, int k) {
    Format::load(x + c, count, token + i);
    for (int part = 0; part < parts; ++part) sum[k] += token[i + part];
  });
  float mean = total(sum) / (float)channels;

  const int64_t whole = channels - channels % Format::width;
  const int rest = (int)(channels - whole);
  for (int part = 0; rest && part < parts; ++part) {
    for (int k = 0; k < lanes; ++k) {
      if (k * parts + part >= rest) token[whole / lanes + part][k] = mean;
    }
  }

  // The deviations from a rounded mean have a mean of their own. Their sums consist of shorter ones.
  constexpr int64_t segment = 1024;
  float deviations = 0, variance = 0;
  for (int64_t first = 0; first < channels; first += segment) {
    vfloat* const part_of_token = token + first / lanes;
    vfloat deviation[sums] = {}, squares[sums] = {};
    const int64_t count = channels - first < segment ? channels - first : segment;
    over_channels<Format>(count, [&](int64_t, int64_t i, int, int k) {
      for (int part = 0; part < parts; ++part) {
        vfloat& v = part_of_token[i + part];
        v -= mean;
        deviation[k] += v;
        squares[k] += v * v;
      }
    });
    deviations += total(deviation);
    variance += total(squares) / (float)channels;
  }
  mean = deviations / (float)channels;
  const float rstd = inverse_deviation(variance - mean * mean, eps);
  over_channels<Format>(channels, [&](int64_t, int64_t i, int, int) {
    for (int part = 0; part < parts; ++part) token[i + part] = (token[i + part] - mean) * rstd;
  });
  for (int part = 0; rest && part < parts; ++part) {
    for (int k = 0; k < lanes; ++k) {
      if (k * parts + part >= rest) token[whole / lanes + part][k] = 0;
    }
  }
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
    over_channels<Format>(a.I, [&](int64_t c, int64_t i, int count, int) {
      vfloat v[Format::parts];
      for (int p = 0; p < Format::parts; ++p) v[p] = gate * (token[i + p] * scale[i + p] + shift[i + p]);
      Format::store(z + c, count, v);
    });
  }
}

template <class Format>
void grad(const mk_gated_combine_bwd_args& a, int64_t part_of_tokens) {
  typedef typename Format::type type;
  constexpr int parts = Format::parts;
  vfloat token[max_vectors], scale[max_vectors], shift[max_vectors], of_scale[max_vectors], of_shift[max_vectors];
  widen<Format>((const type*)a.scale, a.I, scale);
  widen<Format>((const type*)a.shift, a.I, shift);
  const auto clear = [&](int64_t, int64_t i, int, int) {
    for (int p = 0; p < parts; ++p) of_scale[i + p] = of_shift[i + p] = vfloat{};
  };
  over_channels<Format>(a.I, clear);
  const float gate = (float)a.gate, share = 1 / (float)a.I;
  const int64_t begin = part_of_tokens * mk::tokens_per_part;
  const int64_t end = begin + mk::tokens_per_part < a.L ? begin + mk::tokens_per_part : a.L;
  for (int64_t l = begin; l < end; ++l) {
    const float rstd = normalise<Format>((const type*)a.x + l * a.x_stride_token, a.I, (float)a.eps, token);
    const type* const dz = (const type*)a.dz + l * a.I;
    vfloat sum[sums] = {}, along[sums] = {}, of_gate[sums] = {};
    over_channels<Format>(a.I, [&](int64_t c, int64_t i, int count, int k) {
      vfloat d[parts], z[parts];
      Format::load(dz + c, count, d);
      for (int p = 0; p < parts; ++p) {
        const vfloat n = token[i + p], of_n = d[p] * scale[i + p], weighted = n * scale[i + p] + shift[i + p];
        sum[k] += of_n;
        along[k] += of_n * n;
        of_gate[k] += d[p] * weighted;
        of_scale[i + p] += d[p] * n;
        of_shift[i + p] += d[p];
        z[p] = gate * weighted;
      }
      Format::store((type*)a.z + l * a.I + c, count, z);
    });
    const float mean = total(sum) * share, mean_along = total(along) * share, factor = gate * rstd;
    ((float*)a.grad_gate)[l] = total(of_gate);
    over_channels<Format>(a.I, [&](int64_t c, int64_t i, int count, int) {
      vfloat d[parts];
      Format::load(dz + c, count, d);
      for (int p = 0; p < parts; ++p) d[p] = factor * (d[p] * scale[i + p] - mean - token[i + p] * mean_along);
      Format::store((type*)a.grad_x + l * a.I + c, count, d);
    });
  }
  const int64_t out = part_of_tokens * a.I;
  over_channels<Format>(a.I, [&](int64_t c, int64_t i, int count, int) {
    for (int p = 0; p < parts; ++p) {
      of_scale[i + p] *= gate;
      of_shift[i + p] *= gate;
    }
    store_in_order<Format>((float*)a.grad_scale + out + c, count, of_scale + i);
    store_in_order<Format>((float*)a.grad_shift + out + c, count, of_shift + i);
  });
}

}  // namespace

extern const mk::CombineLoops MK_ISA_NAME(gated_combine_loops) = {weigh<F32>, weigh<BF16>, grad<F32>, grad<BF16>};
