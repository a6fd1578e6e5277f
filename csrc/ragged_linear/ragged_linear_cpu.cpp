#include "ragged_linear/ragged_linear_cpu.h"

#include "common/cpu.h"
#include "feature_resample/axis_table.h"
#include "feature_resample/checks.h"

MK_DECLARE_LOOPS(mk::RaggedLinearLoops, ragged_linear_loops)

namespace {

// Runs whole blocks of columns, so that the order of the sums does not depend on where a thread's part begins.
template <class Args>
int over_columns(const char* function, const Args& a, const mk::Limits& rows,
                 const mk::ByDtype<void (*)(const Args&, int64_t, int64_t)>& loops) {
  if (int status = mk::check_limits(function, {rows, {"C", a.C}, {"dtype", a.dtype, MK_F32, MK_BF16}})) return status;
  const auto run = loops[a.dtype];
  const int64_t blocks = (a.C + mk::columns_per_block - 1) / mk::columns_per_block;
  const int64_t grain = 1 + (1 << 16) / (rows.value * mk::columns_per_block + 1);
  return mk::parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t last = end * mk::columns_per_block;
    run(a, begin * mk::columns_per_block, last < a.C ? last : a.C);
  });
}

int sum(const char* function, const mk_ragged_linear_sum_args& a) {
  return over_columns(function, a, {"R", a.R}, ragged_linear_loops().sum);
}

int unfold(const char* function, const mk_ragged_linear_unfold_args& a) {
  return over_columns(function, a, {"O", a.O}, ragged_linear_loops().unfold);
}

int resample(const char* function, const mk_ragged_linear_resample_args& a) {
  if (int status = mk::check_grids(function, a, INT64_MAX, MK_BF16)) return status;
  const mk::AxisTable h(a.in_h, a.out_h, a.in_w * a.C, false), w(a.in_w, a.out_w, a.C, false);
  const int64_t bytes = mk::itemsize(a.dtype);
  const auto run = ragged_linear_loops().resample[a.dtype];
  return mk::parallel_for(a.M * a.out_h, 1 + (1 << 16) / (a.out_w * a.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* const x = (const char*)a.x + bytes * (i / a.out_h) * a.in_h * a.in_w * a.C;
      char* const y = (char*)a.y + bytes * i * a.out_w * a.C;
      run({{x, h.view(), w.view(), i % a.out_h, a.out_w, a.C, y, a.C},
           (const float*)a.scale + i * a.out_w,
           (const float*)a.shift});
    }
  });
}

}  // namespace

MK_DEFINE(mk_ragged_linear_sum, sum)
MK_DEFINE(mk_ragged_linear_unfold, unfold)
MK_DEFINE(mk_ragged_linear_resample, resample)
