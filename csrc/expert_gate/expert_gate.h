// The gate of a sample's experts: softmax over the best `topk` of the selected logits, in fp64: the gradient
// w (g - sum w g) of a gate that is sure of one expert is the difference of two almost equal numbers.
#pragma once

#include "common/mova_kernels.h"

// Choosing takes N * topk steps, and the weights of a sample are on the stack.
enum { MK_MAX_EXPERTS = 1024 };

struct mk_expert_gate_fwd_args {
  uint64_t logits;    // (B, N), read
  uint64_t selected;  // (B, N) bool, read
  uint64_t weights;   // (B, N) fp32, written; 0 where not kept
  uint64_t kept;      // (B, N) bool, written: of equal logits the first ones; NaN counts as infinity
  int64_t B, N;
  int64_t logits_stride_sample, logits_stride_expert, selected_stride_sample, selected_stride_expert;
  int64_t topk;   // at least 1
  int64_t dtype;  // mk_dtype of the logits: MK_F32 or MK_BF16
};

struct mk_expert_gate_bwd_args {
  uint64_t grad;         // (B, N) fp32: the gradient of the weights, read
  uint64_t logits;       // (B, N), read
  uint64_t kept;         // (B, N) bool, read: what fwd wrote
  uint64_t grad_logits;  // (B, N), written
  int64_t B, N;
  int64_t grad_stride_sample, grad_stride_expert, logits_stride_sample, logits_stride_expert;
  int64_t kept_stride_sample, kept_stride_expert;
  int64_t dtype;  // mk_dtype of logits and grad_logits: MK_F32 or MK_BF16
};

MK_API int mk_expert_gate_fwd(const void* args, uint64_t nbytes);
MK_API int mk_expert_gate_bwd(const void* args, uint64_t nbytes);
