// What the driver hands to the loops.
#pragma once

#include <stdint.h>

#include "gated_combine/gated_combine.h"

namespace mk {

// A token, and in the backward pass sums per channel, wait in fp32 on the stack.
constexpr int64_t max_combine_channels = 8192;
constexpr int64_t tokens_per_part = 64;

struct CombineLoops {
  // The tokens [begin, end).
  void (*weigh_f32)(const mk_gated_combine_fwd_args&, int64_t begin, int64_t end);
  void (*weigh_bf16)(const mk_gated_combine_fwd_args&, int64_t begin, int64_t end);
  // One part.
  void (*grad_f32)(const mk_gated_combine_bwd_args&, int64_t part);
  void (*grad_bf16)(const mk_gated_combine_bwd_args&, int64_t part);
};

}  // namespace mk
