// What the kernels of the backward pass for sm_90a share. A block has one producer thread and two or three groups of
// consumers, and works off one item after another: it owns tokens of one kind, with two tensors (keys and values, or
// queries and gradients), and loops over tiles of the other kind. No weight goes through shared memory: what a product
// leaves in registers is the left operand of the next one.
//
// With p = 2^(score - lse), delta = the sum over channels of grad * out, and g = p (grad v^T - delta):
// grad_v = p^T grad, grad_k = g^T q / sqrt(D), grad_q = g k / sqrt(D), where q and k are turned. What is written is
// turned back, by the adjoint of rope. Two kernels with four and three products for each score, where one with five
// would need sums across blocks: so results have the same bits at every call.
#pragma once

#include "common/hopper.h"
#include "expert_attention/expert_attention_cuda.h"

namespace {

using namespace mk::hopper;

struct Backward {
  mk::AttentionWork work;
  const float2* row_sums;  // (P, H, rows): -lse and delta of each query
  int rows;                // L, rounded up to a multiple of 64
  const float *cos, *sin;
  float score_scale;  // of turned queries times turned keys
};

constexpr int part_bytes = 64 * row_bytes;  // 64 tokens, 64 channels: what a group owns of one tensor

// What depends on the head width. `other_tokens` is the number of tokens of a step, `extra_bytes` what a stage holds
// besides the two tensors, `results` the number of tensors that are written. Offsets are from the aligned beginning of
// shared memory.
template <int width_, int groups_, int other_tokens_, int stages_, int extra_bytes_, int results>
struct BackwardLayout {
  static constexpr int width = width_, groups = groups_, other_tokens = other_tokens_, stages = stages_;
  static constexpr int extra_bytes = extra_bytes_, chunks = width / 64, own_tokens = 64 * groups;
  static constexpr int threads = group_threads * (groups + 1);
  static constexpr int producer_registers = groups == 3 ? 32 : 24, consumer_registers = groups == 3 ? 160 : 240;
  static constexpr bool own_in_registers = width == 64;  // a group's own tokens: where they have room
  static constexpr int own_operands = own_in_registers ? width / 16 : 1;
  static constexpr int own_chunk = own_tokens * row_bytes, own_bytes = chunks * own_chunk;
  static constexpr int chunk = other_tokens * row_bytes, tensor_bytes = chunks * chunk;
  static constexpr int stage_bytes = 2 * tensor_bytes + (extra_bytes ? tile_align : 0);
  static constexpr int own = 0, ring = own + 2 * own_bytes, out = ring + stages * stage_bytes;
  static constexpr int barriers = out + results * own_bytes;
  static constexpr int own_full = barriers, own_empty = own_full + 8, full = own_empty + 8, empty = full + 8 * stages;
  static constexpr int bytes = empty + 8 * stages + tile_align;  // room to align the beginning
};

template <class S>
__device__ void init_barriers(uint32_t base) {
  if (threadIdx.x == 0) {
    init_barrier(base + S::own_full, 1), init_barrier(base + S::own_empty, 4 * S::groups);
    for (int i = 0; i < S::stages; ++i) {
      init_barrier(base + S::full + 8 * i, 1), init_barrier(base + S::empty + 8 * i, 4 * S::groups);
    }
    fence_barrier_init();
  }
  __syncthreads();
}

// The producer thread: loads the tensors that an item owns, a and b, and those of each step, c and d. load_extra(to,
// item, step, barrier) loads the rest of a stage.
template <class S, class LoadExtra>
__device__ void produce(uint32_t base, const mk::AttentionWork& work, int steps, const CUtensorMap* a,
                        const CUtensorMap* b, const CUtensorMap* c, const CUtensorMap* d, const LoadExtra& load_extra) {
  Ring<S::stages> stage;
  Ring<1> own;
  const int items = work.items();
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const auto item = work.item(i);
    const int channel = item.head * S::width;
    wait(base + S::own_empty, own.phase ^ 1);
    arrive_and_expect(base + S::own_full, 2 * S::own_bytes);
#pragma unroll
    for (int j = 0; j < S::chunks; ++j) {
      const uint32_t to = base + S::own + j * S::own_chunk;
      load_box(to, a, channel + 64 * j, item.tile * S::own_tokens, item.pair, base + S::own_full);
      load_box(to + S::own_bytes, b, channel + 64 * j, item.tile * S::own_tokens, item.pair, base + S::own_full);
    }
    own.step();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t full = base + S::full + 8 * stage.at, to = base + S::ring + stage.at * S::stage_bytes;
      wait(base + S::empty + 8 * stage.at, stage.phase ^ 1);
      arrive_and_expect(full, 2 * S::tensor_bytes + S::extra_bytes);
#pragma unroll
      for (int j = 0; j < S::chunks; ++j) {
        load_box(to + j * S::chunk, c, channel + 64 * j, step * S::other_tokens, item.pair, full);
        load_box(to + S::tensor_bytes + j * S::chunk, d, channel + 64 * j, step * S::other_tokens, item.pair, full);
      }
      load_extra(to + 2 * S::tensor_bytes, item, step, full);
      stage.step();
    }
    wait(base + S::empty + 8 * stage.at, stage.phase ^ 1);
    arrive(base + S::full + 8 * stage.at);  // a stage with nothing: what consumers wait for in the last step
    stage.step();
  }
}

// Issues d = own other^T over the channels of a head. `own` is in registers or begins at `own_low`.
template <class T, class S, int n>
__device__ void issue_product(float (&d)[n], const uint32_t (&own)[S::own_operands][4], uint32_t own_low,
                              uint32_t other) {
#pragma unroll
  for (int j = 0; j < S::width / 16; ++j) {
    const uint64_t right = whole(other + j / 4 * (S::chunk / 16) + 2 * (j % 4));
    if constexpr (S::own_in_registers) {
      multiply<T>(d, own[j], right, j > 0);
    } else {
      multiply<T>(d, whole(own_low + j / 4 * (S::own_chunk / 16) + 2 * (j % 4)), right, j > 0);
    }
  }
  commit_products();
}

// Issues d += weights other, where `add`, else d = weights other.
template <class T, class S, int n>
__device__ void issue_sum(float (&d)[S::chunks][32], const uint32_t (&weights)[n][4], uint32_t other, bool add) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int c = 0; c < S::chunks; ++c) {
      multiply<T, true>(d[c], weights[j], whole(other + c * (S::chunk / 16) + 128 * j), add || j > 0);
    }
  }
}

// Turns a group's results by the adjoint of rope, times `scale`. `row` is the first of this thread's two tokens.
template <class S>
__device__ void turn_back(float (&d)[S::chunks][32], const Backward& p, int row, float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = min(row + 8 * r, p.work.length - 1);  // what lies behind the end is not written
    const int64_t at = (int64_t)token * S::width + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < S::width / 8; ++j) {
      float (&pair)[32] = d[j / 8];
      const float2 cos = *reinterpret_cast<const float2*>(p.cos + at + 8 * j);
      const float2 sin = *reinterpret_cast<const float2*>(p.sin + at + 8 * j);
      const int i = j % 8 * 4 + 2 * r;
      const float a = pair[i] * scale, b = pair[i + 1] * scale;
      pair[i] = a * cos.x + b * sin.y;
      pair[i + 1] = b * cos.y - a * sin.x;
    }
  }
}

template <class S, class T>
__device__ void write_parts(uint32_t tile, const float (&d)[S::chunks][32]) {
#pragma unroll
  for (int c = 0; c < S::chunks; ++c) store_tile<T>(tile + c * part_bytes, d[c]);
}

template <class S>
__device__ void store_parts(const CUtensorMap* map, uint32_t tile, int channel, int token, int pair) {
#pragma unroll
  for (int c = 0; c < S::chunks; ++c) store_box(map, tile + c * part_bytes, channel + 64 * c, token, pair);
}

// ---- Launching

Backward backward_of(const mk_expert_attention_cuda_bwd_args& a, int own_tokens) {
  const int32_t tiles = (int32_t)((a.L + own_tokens - 1) / own_tokens);
  return {{(const int64_t*)a.num_valid, (int32_t)a.P, (int32_t)a.H, (int32_t)a.L, tiles},
          (const float2*)a.row_sums,
          (int)((a.L + 63) / 64 * 64),
          (const float*)a.cos,
          (const float*)a.sin,
          mk::score_scale(a.dtype, a.D)};
}

}  // namespace
