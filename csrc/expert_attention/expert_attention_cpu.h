// The interface between the driver and the loops.
#pragma once

#include "common/dtype.h"
#include "expert_attention/expert_attention.h"

namespace mk {

// A thread takes this many queries of a head at a time.
constexpr int64_t query_group = 192;

// Loops compute in fp32 and report what fp32 cannot hold, which wide_rows.h then computes: sums that overflow, and
// queries whose log-sum-exp is beyond `largest_lse`. Rounded to fp32, a larger one would make the probabilities that
// backward computes from it wrong by over 1e-4.
constexpr float largest_lse = 0x1p12f;

// One head of one pair. Its tensors are (L, D), with a stride from token to token.
struct AttentionHead {
  const void *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  const float *cos, *sin;
  void* out;  // forward writes it, backward reads it
  int64_t out_stride;
  float* lse;  // (L,), likewise
  int64_t L, D;
};

struct AttentionGradients {
  AttentionHead head;
  const void* grad;  // (L, D), of `out`
  int64_t grad_stride;
  void *grad_q, *grad_k, *grad_v;  // (L, D), with the stride of `out`
};

struct AttentionForward {
  int64_t (*workspace_bytes)(int64_t L, int64_t D);
  void (*pack)(const AttentionHead&, void* workspace);  // keys and values, once per head
  // Takes at most query_group queries. Returns how many of them fp32 cannot hold, and which in `wide`.
  int64_t (*rows)(const AttentionHead&, void* workspace, int64_t first, int64_t end, int64_t* wide);
};

// The result of fp32 for a head or a part of its keys, the worst last. `finite` is right; `not_finite` is right if the
// inputs of the head are not finite either; `out_of_range` is of no use.
enum AttentionOutcome { finite, not_finite, out_of_range };

// The gradient of the queries is a sum over keys. Each call of `keys` writes the part of its keys, part_size(L, D) fp32
// numbers; `queries` adds up `parts` such parts, which follow each other.
struct AttentionBackward {
  int64_t (*workspace_bytes)(int64_t L, int64_t D);
  int64_t (*part_size)(int64_t L, int64_t D);
  AttentionOutcome (*keys)(const AttentionGradients&, void* workspace, int64_t first, int64_t end, float* part);
  AttentionOutcome (*queries)(const AttentionGradients&, const float* part, int64_t parts);
};

typedef ByDtype<AttentionForward> AttentionForwardLoops;
typedef ByDtype<AttentionBackward> AttentionBackwardLoops;

}  // namespace mk
