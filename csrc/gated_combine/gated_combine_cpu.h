// What the driver hands to the loops.
#pragma once

#include "common/dtype.h"
#include "gated_combine/gated_combine.h"

namespace mk {

// A token, and in the backward pass sums per channel, wait in fp32 on the stack.
constexpr int64_t max_combine_channels = 8192;
constexpr int64_t tokens_per_part = 64;

struct CombineLoops {
  ByDtype<void (*)(const mk_gated_combine_fwd_args&, int64_t begin, int64_t end)> weigh;  // the tokens [begin, end)
  ByDtype<void (*)(const mk_gated_combine_bwd_args&, int64_t part)> grad;
};

}  // namespace mk
