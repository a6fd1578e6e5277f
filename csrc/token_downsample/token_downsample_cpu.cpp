#include "token_downsample/token_downsample_cpu.h"

#include "common/cpu.h"
#include "token_downsample/token_downsample.h"

MK_DECLARE_LOOPS(mk::StageLoops, token_downsample_loops)

namespace {

// Adds up `lines` lines of `n` sums each, in order.
int add_lines(const float* partial, int64_t lines, int64_t n, float* sums) {
  return mk::parallel_for(n, 1 + (1 << 16) / (lines + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = 0;
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t i = begin; i < end; ++i) sums[i] += partial[line * n + i];
    }
  });
}

// Each line yields `num_sums` rows of C sums. A single row is added up per sample, others over all samples.
template <mk::StageStep mk::StageLoops::* step, int num_sums>
int run_step(const char* function, const mk_token_downsample_args& a) {
  if (int status = mk::check_limits(function, {{"num_sums", a.num_sums, num_sums, num_sums},
                                               {"pool", a.pool, 0, 1},
                                               {"B", a.B},
                                               {"R", a.R, 1 + a.pool, 1 << 24},
                                               {"C", a.C, 0, MK_MAX_NORM_CHANNELS},
                                               {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  if (a.C == 0) return MK_OK;
  const auto run = (token_downsample_loops().*step)[a.dtype];
  const int64_t bytes = mk::itemsize(a.dtype), tokens = a.R * a.R, side = a.pool ? a.R / 2 : a.R;
  constexpr bool to_side = step == &mk::StageLoops::norm_add;
  const int64_t lines = to_side ? side : a.R, window = a.pool ? 2 + a.R % 2 : 1;
  float* const partial = (float*)a.partial;

  const int64_t grain = 1 + (1 << 14) / (a.R * a.C + 1);
  const int status = mk::parallel_for(a.B * lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / lines, sample = bytes * b * tokens * a.C;
      const auto at = [](uint64_t p, int64_t offset) { return p ? (char*)p + offset : nullptr; };
      const auto row = [&](uint64_t p) { return (const float*)at(p, 4 * b * a.C); };
      run({at(a.x, sample), at(a.grad, sample), at(a.outer, bytes * b * a.outer_stride_sample), (const float*)a.weight,
           (const float*)a.bias, (const float*)a.taps, row(a.gate), row(a.grad_mean),
           at(a.y, to_side ? bytes * b * side * side * a.C : sample), partial + i * num_sums * a.C, i % lines, a.R, a.C,
           a.outer_stride_token, window, (float)a.eps});
    }
  });
  if (status || num_sums == 0) return status;
  if (num_sums > 1) return add_lines(partial, a.B * a.R, num_sums * a.C, (float*)a.sums);
  for (int64_t b = 0; b < a.B; ++b) {
    if (int error = add_lines(partial + b * a.R * a.C, a.R, a.C, (float*)a.sums + b * a.C)) return error;
  }
  return MK_OK;
}

}  // namespace

#define MK_STEP(name, num_sums) MK_DEFINE(mk_token_downsample_##name, (run_step<&mk::StageLoops::name, num_sums>))
MK_STEP(norm_silu, 0)
MK_STEP(conv, 1)
MK_STEP(norm_add, 0)
MK_STEP(norm_add_bwd, 2)
MK_STEP(gate_bwd, 1)
MK_STEP(norm_silu_bwd, 2)
MK_STEP(conv_bwd, 11)
MK_STEP(add_bwd, 0)
