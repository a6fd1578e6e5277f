#include <math.h>

#include "common/dtype.h"
#include "common/host.h"
#include "expert_gate/expert_gate.h"

namespace {

// One sample of a tensor (B, N).
template <class T>
struct Row {
  T* first;
  int64_t stride;

  Row(uint64_t tensor, int64_t sample, int64_t stride_sample, int64_t stride_expert)
      : first((T*)tensor + sample * stride_sample), stride(stride_expert) {}
  T& operator[](int64_t expert) const { return first[expert * stride]; }
};

// Softmax over the kept logits of one sample, 0 where not kept. It reads no other logit.
template <class T>
void softmax(const Row<const T>& logits, const Row<const bool>& kept, int64_t N, double* weights) {
  double most = -INFINITY, sum = 0;
  for (int64_t e = 0; e < N; ++e) {
    if (kept[e]) most = fmax(most, mk::to_float(logits[e]));
  }
  for (int64_t e = 0; e < N; ++e) {
    weights[e] = kept[e] ? exp(mk::to_float(logits[e]) - most) : 0;
    sum += weights[e];
  }
  for (int64_t e = 0; e < N; ++e) weights[e] = kept[e] ? weights[e] / sum : 0;
}

// A total order: NaN counts as infinity.
template <class T>
float rankable(T logit) {
  const float value = mk::to_float(logit);
  return isnan(value) ? INFINITY : value;
}

template <class T>
void forward(const mk_expert_gate_fwd_args& a) {
  double weights[MK_MAX_EXPERTS];
  for (int64_t b = 0; b < a.B; ++b) {
    const Row<const T> logits(a.logits, b, a.logits_stride_sample, a.logits_stride_expert);
    const Row<const bool> selected(a.selected, b, a.selected_stride_sample, a.selected_stride_expert);
    const Row<bool> kept(a.kept, b, a.N, 1);
    for (int64_t e = 0; e < a.N; ++e) kept[e] = false;
    for (int64_t k = 0; k < a.topk; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < a.N; ++e) {
        if (!selected[e] || kept[e]) continue;
        if (best < 0 || rankable(logits[e]) > rankable(logits[best])) best = e;
      }
      if (best < 0) break;
      kept[best] = true;
    }
    softmax(logits, Row<const bool>(a.kept, b, a.N, 1), a.N, weights);
    const Row<float> out(a.weights, b, a.N, 1);
    for (int64_t e = 0; e < a.N; ++e) out[e] = (float)weights[e];
  }
}

template <class T>
void backward(const mk_expert_gate_bwd_args& a) {
  double weights[MK_MAX_EXPERTS];
  for (int64_t b = 0; b < a.B; ++b) {
    const Row<const T> logits(a.logits, b, a.logits_stride_sample, a.logits_stride_expert);
    const Row<const bool> kept(a.kept, b, a.kept_stride_sample, a.kept_stride_expert);
    const Row<const float> grad(a.grad, b, a.grad_stride_sample, a.grad_stride_expert);
    const Row<T> grad_logits(a.grad_logits, b, a.N, 1);
    softmax(logits, kept, a.N, weights);
    double mean = 0;
    for (int64_t e = 0; e < a.N; ++e) mean += kept[e] ? weights[e] * grad[e] : 0;
    for (int64_t e = 0; e < a.N; ++e) {
      mk::from_float(kept[e] ? (float)(weights[e] * (grad[e] - mean)) : 0, &grad_logits[e]);
    }
  }
}

int run_forward(const char* function, const mk_expert_gate_fwd_args& a) {
  if (int status = mk::check_limits(
          function,
          {{"B", a.B}, {"N", a.N, 0, MK_MAX_EXPERTS}, {"topk", a.topk, 1}, {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  a.dtype == MK_F32 ? forward<float>(a) : forward<uint16_t>(a);
  return MK_OK;
}

int run_backward(const char* function, const mk_expert_gate_bwd_args& a) {
  if (int status = mk::check_limits(function,
                                    {{"B", a.B}, {"N", a.N, 0, MK_MAX_EXPERTS}, {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  a.dtype == MK_F32 ? backward<float>(a) : backward<uint16_t>(a);
  return MK_OK;
}

}  // namespace

MK_DEFINE(mk_expert_gate_fwd, run_forward)
MK_DEFINE(mk_expert_gate_bwd, run_backward)
