#include "gated_combine/gated_combine_cpu.h"

#include "common/cpu.h"

MK_DECLARE_LOOPS(mk::CombineLoops, gated_combine_loops)

namespace {

template <class Args>
int check(const char* function, const Args& a) {
  return mk::check_limits(
      function,
      {{"L", a.L, 0, INT64_MAX}, {"I", a.I, 1, mk::max_combine_channels}, {"dtype", a.dtype, MK_F32, MK_BF16}});
}

}  // namespace

MK_API int mk_gated_combine_fwd(const void* block, uint64_t nbytes) {
  const char* const function = "mk_gated_combine_fwd";
  mk_gated_combine_fwd_args a;
  if (int status = mk::read_args(function, block, nbytes, &a)) return status;
  if (int status = check(function, a)) return status;
  const auto run = gated_combine_loops().weigh[a.dtype];
  return mk::parallel_for(a.L, 1 + (1 << 16) / a.I, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

MK_API int mk_gated_combine_bwd(const void* block, uint64_t nbytes) {
  const char* const function = "mk_gated_combine_bwd";
  mk_gated_combine_bwd_args a;
  if (int status = mk::read_args(function, block, nbytes, &a)) return status;
  if (int status = check(function, a)) return status;
  const auto run = gated_combine_loops().grad[a.dtype];
  const int64_t parts = (a.L + mk::tokens_per_part - 1) / mk::tokens_per_part;
  return mk::parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run(a, part);
  });
}
