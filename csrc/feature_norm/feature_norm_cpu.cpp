#include "feature_norm/feature_norm_cpu.h"

#include "common/cpu.h"
#include "feature_norm/feature_norm.h"
#include "feature_resample/axis_table.h"
#include "feature_resample/checks.h"

MK_DECLARE_LOOPS(mk::NormLoops, feature_norm_loops)

namespace {

int forward(const char* function, const mk_feature_norm_fwd_args& a) {
  if (int status = mk::check_grids(function, a, MK_MAX_NORM_CHANNELS, MK_BF16)) return status;
  const mk::AxisTable h(a.in_h, a.out_h, a.in_w * a.x_stride_token, false), w(a.in_w, a.out_w, a.x_stride_token, false);
  const int64_t* const rows = (const int64_t*)a.rows;
  const int64_t bytes = mk::itemsize(a.dtype);
  const auto run = feature_norm_loops().norm[a.dtype];

  const int64_t grain = 1 + (1 << 16) / (a.out_w * a.C + 1);
  return mk::parallel_for(a.M * a.out_h, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / a.out_h, line = i % a.out_h, row = rows ? rows[m] : m;
      if (row < 0) continue;
      const char* const x = (const char*)a.x + bytes * row * a.x_stride_row;
      char* const y = (char*)a.y + bytes * i * a.out_w * a.C;
      run({{x, h.view(), w.view(), line, a.out_w, a.C, y, a.C}, (float*)a.rstd + i * a.out_w, (float)a.eps});
    }
  });
}

int centre(const char* function, const mk_feature_norm_centre_args& a) {
  if (int status = mk::check_grids(function, a, MK_MAX_NORM_CHANNELS, MK_BF16)) return status;
  const int64_t tokens = a.in_h * a.in_w, bytes = mk::itemsize(a.dtype);
  const int64_t* const rows = (const int64_t*)a.rows;
  const auto centre = feature_norm_loops().centre[a.dtype];
  const auto run = feature_norm_loops().rstd[a.dtype];

  int status = mk::parallel_for(a.M * a.in_h, 1 + (1 << 16) / (a.in_w * a.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / a.in_h, token = i % a.in_h * a.in_w, row = rows ? rows[m] : m;
      const char* const x = (const char*)a.x + bytes * (row * a.x_stride_row + token * a.x_stride_token);
      centre({x, a.x_stride_token, (char*)a.n + bytes * i * a.in_w * a.C, a.in_w, a.C});
    }
  });
  if (status) return status;
  const mk::AxisTable h(a.in_h, a.out_h, a.in_w * a.C, false), w(a.in_w, a.out_w, a.C, false);
  return mk::parallel_for(a.M * a.out_h, 1 + (1 << 16) / (a.out_w * a.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / a.out_h, line = i % a.out_h;
      const char* const n = (const char*)a.n + bytes * m * tokens * a.C;
      run({{n, h.view(), w.view(), line, a.out_w, a.C, nullptr, 0}, (float*)a.rstd + i * a.out_w, (float)a.eps});
    }
  });
}

int backward(const char* function, const mk_feature_norm_bwd_args& a) {
  if (int status =
          mk::check_limits(function, {{"M", a.M}, {"L", a.L, 1}, {"C", a.C}, {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  const int64_t* const rows = (const int64_t*)a.rows;
  const int64_t bytes = mk::itemsize(a.dtype);
  const auto run = feature_norm_loops().grad[a.dtype];

  const int64_t grain = 1 + (1 << 16) / (a.C + 1);
  return mk::parallel_for(a.M * a.L, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {  // row by row
      const int64_t m = i / a.L, first = i % a.L, row_end = i - first + a.L;
      const int64_t tokens = (row_end < end ? row_end : end) - i;
      if (!rows || rows[m] >= 0) {
        const char* const grad = (const char*)a.grad + bytes * (m * a.grad_stride_row + first * a.grad_stride_token);
        const int64_t offset = bytes * i * a.C;
        run({grad, a.grad_stride_token, (const char*)a.y + offset, (const float*)a.rstd + i, (char*)a.grad_t + offset,
             tokens, a.C});
      }
      i += tokens;
    }
  });
}

}  // namespace

MK_DEFINE(mk_feature_norm_fwd, forward)
MK_DEFINE(mk_feature_norm_centre, centre)
MK_DEFINE(mk_feature_norm_bwd, backward)
