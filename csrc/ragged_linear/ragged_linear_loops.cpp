// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "feature_resample/sum_taps.h"
#include "ragged_linear/ragged_linear_cpu.h"

namespace {

// Vectors of sums over rows. A plain sum over thousands would lose digits: 16 rows are summed on their own, then 16
// such sums, then those.
template <int n>
struct Sums {
  vfloat latest[n] = {}, middle[n] = {}, all[n] = {};

  MK_INLINE void close(int64_t rows) {
    if (rows % 16 == 0) move(latest, middle);
    if (rows % 256 == 0) move(middle, all);
  }
  MK_INLINE void finish() {
    move(latest, middle);
    move(middle, all);
  }

 private:
  static MK_INLINE void move(vfloat (&from)[n], vfloat (&to)[n]) {
    MK_UNROLL for (int i = 0; i < n; ++i) {
      to[i] += from[i];
      from[i] = vfloat{};
    }
  }
};

// Sums n registers of neighbouring channels, `count` in each.
template <class Format, int n>
MK_INLINE void sum_block(const mk_ragged_linear_sum_args& a, int64_t c, int count) {
  constexpr int parts = Format::parts;
  const auto* const x = (const typename Format::type*)a.x + c;
  Sums<n * parts> sums;
  for (int64_t r = 0; r < a.R; ++r) {
    vfloat v[n][parts];
    MK_UNROLL for (int i = 0; i < n; ++i) {
      Format::load(x + r * a.x_stride_row + i * Format::width, count, v[i]);
      for (int part = 0; part < parts; ++part) sums.latest[i * parts + part] += v[i][part];
    }
    sums.close(r + 1);
  }
  sums.finish();
  for (int i = 0; i < n; ++i) {
    store_in_order<Format>((float*)a.sum + c + i * Format::width, count, sums.all + i * parts);
  }
}

// Takes its arguments by value: as far as the compiler knows, a store could change those behind a reference.
template <class Format, int n>
MK_INLINE void unfold_block(const mk_ragged_linear_unfold_args a, int64_t c, int count) {
  constexpr int parts = Format::parts;
  typedef typename Format::type type;
  const float* const total = (const float*)a.total;
  vfloat scale[n][parts], shift[n][parts];
  for (int i = 0; i < n; ++i) {
    Format::load((const type*)a.scale + c + i * Format::width, count, scale[i]);
    Format::load((const type*)a.shift + c + i * Format::width, count, shift[i]);
  }
  Sums<n * parts> scales, shifts;
  for (int64_t o = 0; o < a.O; ++o) {
    const type* const grads = (const type*)a.grad_folded + o * a.grad_folded_stride_row + c;
    const type* const weights = (const type*)a.weight + o * a.weight_stride_row + c;
    type* const out = (type*)a.grad_weight + o * a.C + c;
    MK_UNROLL for (int i = 0; i < n; ++i) {
      vfloat grad[parts], weight[parts];
      Format::load(grads + i * Format::width, count, grad);
      Format::load(weights + i * Format::width, count, weight);
      for (int part = 0; part < parts; ++part) {
        scales.latest[i * parts + part] += grad[part] * weight[part];
        shifts.latest[i * parts + part] += total[o] * weight[part];
        grad[part] = grad[part] * scale[i][part] + total[o] * shift[i][part];
      }
      Format::store(out + i * Format::width, count, grad);
    }
    scales.close(o + 1);
    shifts.close(o + 1);
  }
  scales.finish();
  shifts.finish();
  for (int i = 0; i < n; ++i) {
    store_in_order<Format>((float*)a.grad_scale + c + i * Format::width, count, scales.all + i * parts);
    store_in_order<Format>((float*)a.grad_shift + c + i * Format::width, count, shifts.all + i * parts);
  }
}

// Both take as many vectors of fp32 at once as leave registers for the rest.
template <class Format>
void sum(const mk_ragged_linear_sum_args& a, int64_t begin, int64_t end) {
  for_each_block<Format, 4 / Format::parts>(end - begin, [&](int64_t c, int count, auto registers) MK_ALWAYS_INLINE {
    sum_block<Format, registers.value>(a, begin + c, count);
  });
}
template <class Format>
void unfold(const mk_ragged_linear_unfold_args& a, int64_t begin, int64_t end) {
  for_each_block<Format, 2 / Format::parts>(end - begin, [&](int64_t c, int count, auto registers) MK_ALWAYS_INLINE {
    unfold_block<Format, registers.value>(a, begin + c, count);
  });
}

template <class Format>
void resample_line(const mk::ScaledLine& line) {
  for (int64_t x = 0; x < line.resample.width; ++x) {
    auto* const dst = static_cast<typename Format::type*>(line.resample.dst) + x * line.resample.dst_stride;
    resample<Format>(line.resample, x, [&](int64_t c, int count, int, const vfloat* sum) MK_ALWAYS_INLINE {
      store<Format>(dst + c, count, line.scale[x] * sum[0] + load<F32>(line.shift + c, count));
    });
  }
}

}  // namespace

extern const mk::RaggedLinearLoops MK_ISA_NAME(ragged_linear_loops) = {
    {sum<F32>, sum<BF16>}, {unfold<F32>, unfold<BF16>}, {resample_line<F32>, resample_line<BF16InOrder>}};
