// For the driver: what loops leave undone because fp32 cannot hold it, computed in fp64.
#pragma once

#include "common/mova_kernels.h"
#include "expert_attention/expert_attention_cpu.h"

namespace mk {

// `out` and `lse` of `count` queries, or the gradients of all. False if there is no memory. `dtype` is an mk_dtype.
bool wide_forward(const AttentionHead&, int64_t dtype, const int64_t* queries, int64_t count);
bool wide_backward(const AttentionGradients&, int64_t dtype);

// Whether q, k, v and the gradient of `out` are free of NaN and infinities.
bool inputs_are_finite(const AttentionGradients&, int64_t dtype);

}  // namespace mk
