#include "feature_resample/feature_resample_cpu.h"

#include <vector>

#include "common/cpu.h"
#include "feature_resample/checks.h"
#include "feature_resample/feature_resample.h"
#include "feature_resample/taps.h"

MK_DECLARE_LOOPS(mk::ResampleLoops, feature_resample_loops)

namespace {

// Owns the tables of one axis: 2 * out taps at most, whichever side they are listed by.
class AxisTable {
 public:
  // `step`: elements between neighbouring positions of the read tensor.
  AxisTable(int64_t in, int64_t out, int64_t step, bool adjoint) {
    const mk::ResampleAxis axis{(int32_t)in, (int32_t)out};
    const int32_t positions = adjoint ? axis.in : axis.out;
    begin_.reserve(positions + 1);
    offset_.reserve(2 * out);
    weight_.reserve(2 * out);
    begin_.push_back(0);
    for (int32_t p = 0; p < positions; ++p) {
      const int32_t first = adjoint ? axis.first_reader(p) : axis.tap0(p);
      const int32_t end = adjoint ? axis.last_reader(p) : axis.tap1(p) + 1;
      for (int32_t q = first; q < end; ++q) {
        offset_.push_back(q * step);
        weight_.push_back(adjoint ? axis.weight(q, p) : axis.weight(p, q));
      }
      begin_.push_back((int64_t)offset_.size());
    }
  }
  mk::GatherAxis view() const { return {begin_.data(), offset_.data(), weight_.data()}; }

 private:
  std::vector<int64_t> begin_, offset_;
  std::vector<float> weight_;
};

struct Side {
  char* data;
  int64_t h, w, stride_row, stride_token;
};

int resample(const char* function, const void* block, uint64_t nbytes, bool adjoint) {
  mk_feature_resample_args a;
  if (int status = mk::read_args(function, block, nbytes, &a)) return status;
  if (int status = mk::check(function, a, adjoint)) return status;
  if (a.dtype == MK_F16) return mk::fail(MK_UNSUPPORTED, "%s: float16 is not supported on the CPU", function);

  const Side x{(char*)a.x, a.in_h, a.in_w, a.x_stride_row, a.x_stride_token};
  const Side y{(char*)a.y, a.out_h, a.out_w, a.y_stride_row, a.y_stride_token};
  const Side src = adjoint ? y : x, dst = adjoint ? x : y;
  const AxisTable h(a.in_h, a.out_h, src.w * src.stride_token, adjoint);
  const AxisTable w(a.in_w, a.out_w, src.stride_token, adjoint);
  const int64_t* rows = (const int64_t*)a.rows;
  const int64_t bytes = a.dtype == MK_F32 ? 4 : 2;
  const auto run = a.dtype == MK_F32 ? feature_resample_loops().f32 : feature_resample_loops().bf16;

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

MK_API int mk_feature_resample_fwd(const void* args, uint64_t nbytes) {
  return resample("mk_feature_resample_fwd", args, nbytes, false);
}

MK_API int mk_feature_resample_bwd(const void* args, uint64_t nbytes) {
  return resample("mk_feature_resample_bwd", args, nbytes, true);
}
