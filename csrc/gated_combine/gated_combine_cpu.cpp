#include "gated_combine/gated_combine_cpu.h"

#include "common/cpu.h"

MK_DECLARE_LOOPS(mk::CombineLoops, gated_combine_loops)

namespace {

template <class Args>
int check(const char* function, const Args& a) {
  return mk::check_limits(function,
                          {{"L", a.L}, {"I", a.I, 1, MK_MAX_NORM_CHANNELS}, {"dtype", a.dtype, MK_F32, MK_BF16}});
}

int forward(const char* function, const mk_gated_combine_fwd_args& a) {
  if (int status = check(function, a)) return status;
  const auto run = gated_combine_loops().weigh[a.dtype];
  return mk::parallel_for(a.L, 1 + (1 << 16) / a.I, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

int backward(const char* function, const mk_gated_combine_bwd_args& a) {
  if (int status = check(function, a)) return status;
  const auto run = gated_combine_loops().grad[a.dtype];
  const int64_t parts = (a.L + MK_COMBINE_TOKENS_PER_PART - 1) / MK_COMBINE_TOKENS_PER_PART;
  return mk::parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run(a, part);
  });
}

}  // namespace

MK_DEFINE(mk_gated_combine_fwd, forward)
MK_DEFINE(mk_gated_combine_bwd, backward)
