// The checks that the CPU and the CUDA entry points share.
#pragma once

#include "common/host.h"
#include "feature_resample/feature_resample.h"
#include "feature_resample/taps.h"

namespace mk {

inline int check(const char* function, const mk_feature_resample_args& a, bool adjoint) {
  if (int status = check_limits(function, {{"M", a.M, 0, INT64_MAX},
                                           {"in_h", a.in_h, 1, max_axis},
                                           {"in_w", a.in_w, 1, max_axis},
                                           {"out_h", a.out_h, 1, max_axis},
                                           {"out_w", a.out_w, 1, max_axis},
                                           {"C", a.C, 0, INT64_MAX},
                                           {"dtype", a.dtype, MK_F32, MK_F16}})) {
    return status;
  }
  if (adjoint && a.rows != 0) return fail(MK_BAD_ARG, "%s: rows must be 0", function);
  return MK_OK;
}

}  // namespace mk
