#include "swiglu_norm/swiglu_norm_cpu.h"

#include "common/cpu.h"
#include "swiglu_norm/swiglu_norm.h"

MK_DECLARE_LOOPS(mk::SwigluLoops, swiglu_norm_loops)

namespace {

int forward(const char* function, const mk_swiglu_norm_fwd_args& a) {
  if (int status = mk::check_limits(function, {{"B", a.B},
                                               {"L", a.L},
                                               {"width", a.width, 0, MK_MAX_NORM_CHANNELS},
                                               {"F", a.F, 0, a.width},
                                               {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  const int64_t bytes = mk::itemsize(a.dtype);
  const auto run = swiglu_norm_loops().norm[a.dtype];
  return mk::parallel_for(a.B * a.L, 1 + (1 << 15) / (a.F + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / a.L, token = i % a.L;
      run({(const char*)a.gate + bytes * (sample * a.gate_stride_sample + token * a.gate_stride_token),
           (const char*)a.up + bytes * (sample * a.up_stride_sample + token * a.up_stride_token),
           (const float*)a.weight, (const float*)a.bias, (char*)a.y + bytes * i * a.width, (float*)a.mean + i,
           (float*)a.rstd + i, (float)a.eps, a.F, a.width});
    }
  });
}

int backward(const char* function, const mk_swiglu_norm_bwd_args& a) {
  if (int status = mk::check_limits(function, {{"B", a.B},
                                               {"L", a.L},
                                               {"width", a.width, 0, MK_MAX_NORM_CHANNELS},
                                               {"F", a.F, 0, a.width},
                                               {"blocks", a.blocks, 1, 1 << 16},
                                               {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  const int64_t bytes = mk::itemsize(a.dtype), tokens = a.B * a.L;
  const auto run = swiglu_norm_loops().grad[a.dtype];
  float* const sums = (float*)a.sums;

  const int64_t grain = 1 + (1 << 15) / (tokens / a.blocks * a.F + 1);
  const int status = mk::parallel_for(a.blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* const sum_weight = sums + 2 * b * a.width;
      for (int64_t i = 0; i < 2 * a.width; ++i) sum_weight[i] = 0;
      for (int64_t i = tokens * b / a.blocks; i < tokens * (b + 1) / a.blocks; ++i) {
        const int64_t sample = i / a.L, token = i % a.L;
        run({(const char*)a.grad + bytes * (sample * a.grad_stride_sample + token * a.grad_stride_token),
             (const char*)a.gate + bytes * (sample * a.gate_stride_sample + token * a.gate_stride_token),
             (const char*)a.up + bytes * (sample * a.up_stride_sample + token * a.up_stride_token),
             (const float*)a.weight, ((const float*)a.mean)[i], ((const float*)a.rstd)[i],
             (char*)a.grad_gate + bytes * i * a.width, (char*)a.grad_up + bytes * i * a.width, sum_weight,
             sum_weight + a.width, a.F, a.width});
      }
    }
  });
  if (status) return status;

  return mk::parallel_for(a.width, 1 + (1 << 15) / a.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < 2; ++part) {
      float* const all = part ? (float*)a.grad_bias : (float*)a.grad_weight;
      memcpy(all + begin, sums + part * a.width + begin, (end - begin) * sizeof *sums);
      for (int64_t b = 1; b < a.blocks; ++b) {
        const float* const sum = sums + (2 * b + part) * a.width;
        for (int64_t c = begin; c < end; ++c) all[c] += sum[c];
      }
    }
  });
}

}  // namespace

MK_DEFINE(mk_swiglu_norm_fwd, forward)
MK_DEFINE(mk_swiglu_norm_bwd, backward)
