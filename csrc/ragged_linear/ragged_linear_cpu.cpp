#include "ragged_linear/ragged_linear_cpu.h"

#include "common/cpu.h"
#include "feature_resample/axis_table.h"

MK_DECLARE_LOOPS(mk::RaggedLinearLoops, ragged_linear_loops)

namespace {

// Whole blocks of columns: the order of the sums is the same wherever a thread's part begins.
template <class Args>
int over_columns(const Args& a, int64_t rows, void (*run)(const Args&, int64_t, int64_t)) {
  const int64_t blocks = (a.C + mk::columns_per_block - 1) / mk::columns_per_block;
  const int64_t grain = 1 + (1 << 16) / (rows * mk::columns_per_block + 1);
  return mk::parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
    const int64_t last = end * mk::columns_per_block;
    run(a, begin * mk::columns_per_block, last < a.C ? last : a.C);
  });
}

}  // namespace

MK_API int mk_ragged_linear_sum(const void* block, uint64_t nbytes) {
  const char* const function = "mk_ragged_linear_sum";
  mk_ragged_linear_sum_args a;
  if (int status = mk::read_args(function, block, nbytes, &a)) return status;
  if (int status = mk::check_limits(
          function, {{"R", a.R, 0, INT64_MAX}, {"C", a.C, 0, INT64_MAX}, {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  return over_columns(a, a.R, ragged_linear_loops().sum[a.dtype]);
}

MK_API int mk_ragged_linear_unfold(const void* block, uint64_t nbytes) {
  const char* const function = "mk_ragged_linear_unfold";
  mk_ragged_linear_unfold_args a;
  if (int status = mk::read_args(function, block, nbytes, &a)) return status;
  if (int status = mk::check_limits(
          function, {{"O", a.O, 0, INT64_MAX}, {"C", a.C, 0, INT64_MAX}, {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  return over_columns(a, a.O, ragged_linear_loops().unfold[a.dtype]);
}

MK_API int mk_ragged_linear_resample(const void* block, uint64_t nbytes) {
  const char* const function = "mk_ragged_linear_resample";
  mk_ragged_linear_resample_args a;
  if (int status = mk::read_args(function, block, nbytes, &a)) return status;
  if (int status = mk::check_limits(function, {{"M", a.M, 0, INT64_MAX},
                                               {"in_h", a.in_h, 1, mk::max_axis},
                                               {"in_w", a.in_w, 1, mk::max_axis},
                                               {"out_h", a.out_h, 1, mk::max_axis},
                                               {"out_w", a.out_w, 1, mk::max_axis},
                                               {"C", a.C, 0, INT64_MAX},
                                               {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
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
