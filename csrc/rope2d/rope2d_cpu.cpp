#include "rope2d/rope2d_cpu.h"

#include "common/cpu.h"
#include "rope2d/rope2d.h"

MK_DECLARE_LOOPS(mk::RopeLoops, rope2d_loops)

namespace {

int rotate(const char* function, const mk_rope2d_args& a) {
  if (int status = mk::check_limits(function, {{"B", a.B},
                                               {"L", a.L},
                                               {"H", a.H},
                                               {"D", a.D},
                                               {"adjoint", a.adjoint, 0, 1},
                                               {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  if (a.D % 2) return mk::fail(MK_BAD_ARG, "%s: D must be even, got %lld", function, (long long)a.D);
  const int64_t bytes = mk::itemsize(a.dtype);
  const auto run = (a.adjoint ? rope2d_loops().adjoint : rope2d_loops().rotate)[a.dtype];
  return mk::parallel_for(a.B * a.L, 1 + (1 << 16) / (a.H * a.D + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / a.L, token = i % a.L;
      run({(const char*)a.x + bytes * (sample * a.x_stride_sample + token * a.x_stride_token), a.x_stride_head,
           (const float*)a.cos + token * a.D, (const float*)a.sin + token * a.D, (char*)a.y + bytes * i * a.H * a.D,
           a.H, a.D});
    }
  });
}

}  // namespace

MK_DEFINE(mk_rope2d, rotate)
