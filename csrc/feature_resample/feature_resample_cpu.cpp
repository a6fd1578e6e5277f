#include "feature_resample/feature_resample_cpu.h"

#include "common/cpu.h"
#include "feature_resample/axis_table.h"
#include "feature_resample/checks.h"
#include "feature_resample/feature_resample.h"

MK_DECLARE_LOOPS(mk::ResampleLoops, feature_resample_loops)

namespace {

struct Side {
  char* data;
  int64_t h, w, stride_row, stride_token;
};

template <bool adjoint>
int resample(const char* function, const mk_feature_resample_args& a) {
  if (int status = mk::check(function, a, adjoint)) return status;
  if (a.dtype == MK_F16) return mk::fail(MK_UNSUPPORTED, "%s: float16 is not supported on the CPU", function);

  const Side x{(char*)a.x, a.in_h, a.in_w, a.x_stride_row, a.x_stride_token};
  const Side y{(char*)a.y, a.out_h, a.out_w, a.y_stride_row, a.y_stride_token};
  const Side src = adjoint ? y : x, dst = adjoint ? x : y;
  const mk::AxisTable h(a.in_h, a.out_h, src.w * src.stride_token, adjoint);
  const mk::AxisTable w(a.in_w, a.out_w, src.stride_token, adjoint);
  const int64_t* rows = (const int64_t*)a.rows;
  const int64_t bytes = mk::itemsize(a.dtype);
  const auto run = feature_resample_loops()[a.dtype];

  const int64_t grain = 1 + (1 << 16) / (dst.w * a.C + 1);
  return mk::parallel_for(a.M * dst.h, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / dst.h, line = i % dst.h, row = rows ? rows[m] : m;
      char* out = dst.data + bytes * (m * dst.stride_row + line * dst.w * dst.stride_token);
      if (row < 0) {
        for (int64_t p = 0; p < dst.w; ++p) memset(out + bytes * p * dst.stride_token, 0, bytes * a.C);
      } else {
        const char* in = src.data + bytes * row * src.stride_row;
        run({in, h.view(), w.view(), line, dst.w, a.C, out, dst.stride_token});
      }
    }
  });
}

}  // namespace

MK_DEFINE(mk_feature_resample_fwd, resample<false>)
MK_DEFINE(mk_feature_resample_bwd, resample<true>)
