// The checks of the functions that resample grids.
#pragma once

#include "common/host.h"
#include "feature_resample/feature_resample.h"

namespace mk {

template <class Args>
int check_grids(const char* function, const Args& a, int64_t max_channels, mk_dtype last_dtype) {
  return check_limits(function, {{"M", a.M},
                                 {"in_h", a.in_h, 1, MK_MAX_GRID_SIDE},
                                 {"in_w", a.in_w, 1, MK_MAX_GRID_SIDE},
                                 {"out_h", a.out_h, 1, MK_MAX_GRID_SIDE},
                                 {"out_w", a.out_w, 1, MK_MAX_GRID_SIDE},
                                 {"C", a.C, 0, max_channels},
                                 {"dtype", a.dtype, MK_F32, last_dtype}});
}

// Of the CPU and the CUDA function.
inline int check(const char* function, const mk_feature_resample_args& a, bool adjoint) {
  if (int status = check_grids(function, a, INT64_MAX, MK_F16)) return status;
  if (adjoint && a.rows != 0) return fail(MK_BAD_ARG, "%s: rows must be 0", function);
  return MK_OK;
}

}  // namespace mk
