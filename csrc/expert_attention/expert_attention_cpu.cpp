#include "expert_attention/expert_attention_cpu.h"

#include <algorithm>
#include <atomic>

#include "common/cpu.h"
#include "expert_attention/wide_rows.h"

MK_DECLARE_LOOPS(mk::AttentionForwardLoops, attention_forward_loops)
MK_DECLARE_LOOPS(mk::AttentionBackwardLoops, attention_backward_loops)

namespace {

// For backward: enough tasks for the threads of a large machine, and the fewest keys that are worth a task.
constexpr int64_t enough_tasks = 64, fewest_keys = 384;
constexpr int64_t most_scratch = 1 << 26;  // bytes, unless `enough_tasks` need more

template <class Args>
int check(const char* function, const Args& a) {
  if (int status = mk::check_limits(function, {{"P", a.P},
                                               {"L", a.L, 1},
                                               {"H", a.H, 1},
                                               {"D", a.D, 2, MK_MAX_HEAD_WIDTH},
                                               {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  return a.D % 2 == 0 ? MK_OK : mk::fail(MK_BAD_ARG, "%s: D must be even, got %lld", function, (long long)a.D);
}

// The `index`-th head of all pairs.
template <class Args>
mk::AttentionHead head(const Args& a, int64_t index) {
  const int64_t pair = index / a.H, head = index % a.H, bytes = mk::itemsize(a.dtype);
  const auto at = [&](uint64_t base, int64_t stride_pair) {
    return (char*)base + bytes * (pair * stride_pair + head * a.D);
  };
  return {at(a.q, a.q_stride_pair),
          at(a.k, a.k_stride_pair),
          at(a.v, a.v_stride_pair),
          a.q_stride_token,
          a.k_stride_token,
          a.v_stride_token,
          (const float*)a.cos,
          (const float*)a.sin,
          at(a.out, a.L * a.H * a.D),
          a.H * a.D,
          (float*)a.lse + index * a.L,
          a.L,
          a.D};
}

int forward(const char* function, const mk_expert_attention_fwd_args& a) {
  if (int status = check(function, a)) return status;
  const auto& loops = attention_forward_loops()[a.dtype];
  const int64_t bytes = loops.workspace_bytes(a.L, a.D), groups = (a.L + mk::query_group - 1) / mk::query_group;

  // A range covers whole heads except at its ends, so that few heads are packed by two threads.
  std::atomic<bool> failed{false};
  const int64_t grain = 1 + (1 << 20) / (a.L * a.D * mk::query_group);
  const int status = mk::parallel_for(a.P * a.H * groups, grain, [&](int64_t begin, int64_t end) {
    void* const workspace = mk::workspace(bytes);
    if (!workspace) failed = true;
    for (int64_t i = begin; workspace && i < end; ++i) {
      const int64_t first = i % groups * mk::query_group, last = first + mk::query_group;
      const mk::AttentionHead h = head(a, i / groups);
      if (i == begin || first == 0) loops.pack(h, workspace);
      int64_t wide[mk::query_group];
      const int64_t num_wide = loops.rows(h, workspace, first, last < a.L ? last : a.L, wide);
      if (num_wide > 0 && !mk::wide_forward(h, a.dtype, wide, num_wide)) failed = true;
    }
  });
  return failed ? mk::no_memory(function) : status;
}

int backward(const char* function, const mk_expert_attention_bwd_args& a) {
  if (int status = check(function, a)) return status;
  const auto& loops = attention_backward_loops()[a.dtype];
  const int64_t heads = a.P * a.H, bytes = loops.workspace_bytes(a.L, a.D), itemsize = mk::itemsize(a.dtype);
  if (heads == 0) return MK_OK;

  // Where there are few heads, their keys are split. The split ignores the number of threads, which changes no bit.
  const int64_t wanted = (enough_tasks + heads - 1) / heads, most = (a.L + fewest_keys - 1) / fewest_keys;
  const int64_t parts = wanted < most ? wanted : most, keys = (a.L + parts - 1) / parts;
  const int64_t part_size = loops.part_size(a.L, a.D), head_size = parts * part_size * (int64_t)sizeof(float);
  // A group of heads keeps the threads busy, and its parts fit into most_scratch.
  const int64_t fitting = most_scratch / head_size, group = fitting < enough_tasks ? enough_tasks : fitting;
  const int64_t at_once = group < heads ? group : heads, num_outcomes = at_once * parts;
  float* const partial =
      (float*)mk::workspace(at_once * head_size + num_outcomes * sizeof(mk::AttentionOutcome), mk::shared_slot);
  if (!partial) return mk::no_memory(function);
  mk::AttentionOutcome* const outcomes = (mk::AttentionOutcome*)((char*)partial + at_once * head_size);

  const auto gradients = [&](int64_t index) {
    const int64_t pair = index / a.H, offset = itemsize * (index % a.H) * a.D;
    const int64_t out = itemsize * pair * a.L * a.H * a.D + offset;
    return mk::AttentionGradients{
        head(a, index),        (const char*)a.grad + itemsize * pair * a.grad_stride_pair + offset,
        a.grad_stride_token,   (char*)a.grad_q + out,
        (char*)a.grad_k + out, (char*)a.grad_v + out};
  };
  std::atomic<bool> failed{false};
  const int64_t grain = 1 + (1 << 20) / (a.L * keys * a.D);
  for (int64_t first = 0; first < heads; first += group) {
    const int64_t count = heads - first < group ? heads - first : group;
    int status = mk::parallel_for(count * parts, grain, [&](int64_t begin, int64_t end) {
      void* const workspace = mk::workspace(bytes);
      if (!workspace) failed = true;
      for (int64_t i = begin; workspace && i < end; ++i) {
        const int64_t key = i % parts * keys, last = key + keys < a.L ? key + keys : a.L;
        outcomes[i] = loops.keys(gradients(first + i / parts), workspace, key, last, partial + i * part_size);
      }
    });
    if (failed) return mk::no_memory(function);
    if (status) return status;
    status = mk::parallel_for(count, 1 + (1 << 20) / (part_size * parts), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const mk::AttentionGradients g = gradients(first + i);
        mk::AttentionOutcome worst = *std::max_element(outcomes + i * parts, outcomes + (i + 1) * parts);
        if (worst != mk::out_of_range) {
          worst = std::max(worst, loops.queries(g, partial + i * parts * part_size, parts));
        }
        const bool wide = worst == mk::out_of_range || (worst == mk::not_finite && mk::inputs_are_finite(g, a.dtype));
        if (wide && !mk::wide_backward(g, a.dtype)) failed = true;
      }
    });
    if (failed) return mk::no_memory(function);
    if (status) return status;
  }
  return MK_OK;
}

}  // namespace

MK_DEFINE(mk_expert_attention_fwd, forward)
MK_DEFINE(mk_expert_attention_bwd, backward)
