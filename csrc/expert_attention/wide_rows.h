// For the driver: computes in fp64 the results that loops report as beyond fp32.
#pragma once

#include "common/mova_kernels.h"
#include "expert_attention/expert_attention_cpu.h"

namespace mk {

// Compute `out` and `lse` of `count` queries, or the gradients of a head. They return false if there is no memory.
// `dtype` is an mk_dtype.
bool wide_forward(const AttentionHead&, int64_t dtype, const int64_t* queries, int64_t count);
bool wide_backward(const AttentionGradients&, int64_t dtype);

// Whether q, k, v and the gradient of `out` are free of NaN and infinities.
bool inputs_are_finite(const AttentionGradients&, int64_t dtype);

}  // namespace mk
