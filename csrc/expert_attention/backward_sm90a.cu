// Attention, backward, with wgmma and TMA: one kernel for the gradients of keys and values, with four products for each
// score, and one for that of queries, with three. Nothing is added up across blocks, so that results have the same bits
// at every call, and no weight goes through shared memory: what a product leaves in registers is the left operand of
// the next one.
//
// With p = 2^(score - lse), delta = the sum over channels of grad * out, and g = p (grad v^T - delta):
// grad_v = p^T grad, grad_k = g^T q / sqrt(D), grad_q = g k / sqrt(D), where q and k are turned. What is written is
// turned back, by the adjoint of rope.
//
// As in forward_sm90a.cu, a block has one producer thread and two or three groups of consumers, and works off one item
// after another: it owns tokens of one kind and loops over tiles of the other kind.
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "expert_attention/expert_attention_cuda.h"

namespace {

using namespace mk::hopper;
using mk::AttentionWork;

struct Backward {
  AttentionWork work;
  const float2* row_sums;  // (P, H, rows) -lse and delta of each query
  int rows;                // L, rounded up to a multiple of 64
  const float *cos, *sin;
  float score_scale;  // of turned queries times turned keys
  float query_scale;  // of the gradient of turned queries
  float key_scale;    // of the gradient of turned keys
};

constexpr int part_bytes = 64 * row_bytes;  // 64 tokens, 64 channels: what a group owns of one tensor

// Turns a group's 64 x 64 results by the adjoint of rope. `row` is the first of this thread's two rows.
__device__ inline void turn_back(float (&d)[32], const Backward& p, int row, int channel, int width, float scale) {
  const int column = channel + threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = min(row + 8 * r, p.work.length - 1);  // what lies behind the end is not written
    const int64_t at = (int64_t)token * width + column;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 cos = *reinterpret_cast<const float2*>(p.cos + at + 8 * j);
      const float2 sin = *reinterpret_cast<const float2*>(p.sin + at + 8 * j);
      const float a = d[4 * j + 2 * r] * scale, b = d[4 * j + 2 * r + 1] * scale;
      d[4 * j + 2 * r] = a * cos.x + b * sin.y;
      d[4 * j + 2 * r + 1] = b * cos.y - a * sin.x;
    }
  }
}

template <int chunks>
__device__ void store_parts(const CUtensorMap* map, uint32_t tile, int channel, int token, int pair) {
#pragma unroll
  for (int c = 0; c < chunks; ++c) store_box(map, tile + c * part_bytes, channel + 64 * c, token, pair);
}

// The barriers of one set of owned tokens and a ring of stages.
template <int stages>
struct Barriers {
  uint32_t own_full, own_empty, full, empty;
  static constexpr int bytes = 16 + 16 * stages;
  __device__ explicit Barriers(uint32_t at)
      : own_full(at), own_empty(at + 8), full(at + 16), empty(at + 16 + 8 * stages) {}
  __device__ void init(int consumer_warps) const {
    init_barrier(own_full, 1), init_barrier(own_empty, consumer_warps);
    for (int i = 0; i < stages; ++i) init_barrier(full + 8 * i, 1), init_barrier(empty + 8 * i, consumer_warps);
    fence_barrier_init();
  }
};

// ---- The gradients of keys and values: a block owns 128 keys, and loops over queries

template <int width>
struct KeyLayout {
  static constexpr int chunks = width / 64, groups = 2, keys = 64 * groups, threads = group_threads * (groups + 1);
  // Queries of a step, as many as the registers hold. Where they do, keys and values are in registers as well.
  static constexpr int queries = width == 64 ? 64 : 32, stages = width == 64 ? 6 : 5;
  static constexpr bool own_in_registers = width == 64;
  static constexpr int own_chunk = keys * row_bytes, own_bytes = chunks * own_chunk;
  static constexpr int chunk = queries * row_bytes, tensor_bytes = chunks * chunk, sums_bytes = queries * 8;
  static constexpr int stage_bytes = 2 * tensor_bytes + tile_align;  // queries, gradients, row sums
  static constexpr int own = 0, ring = own + 2 * own_bytes, out = ring + stages * stage_bytes;
  static constexpr int barriers = out + 2 * own_bytes, bytes = barriers + Barriers<stages>::bytes + tile_align;
};

template <class T, int width>
__global__ void __launch_bounds__(KeyLayout<width>::threads, 1)
    attention_grad_kv(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap grad_map,
                      const __grid_constant__ CUtensorMap sums_map, const __grid_constant__ CUtensorMap grad_k_map,
                      const __grid_constant__ CUtensorMap grad_v_map, const __grid_constant__ Backward p) {
  using S = KeyLayout<width>;
  extern __shared__ uint8_t memory[];
  const uint32_t base = aligned_shared_address(memory);
  const Barriers<S::stages> barriers(base + S::barriers);
  const AttentionWork& work = p.work;
  const int group = group_index(), steps = (work.length + S::queries - 1) / S::queries, items = work.items();
  if (threadIdx.x == 0) barriers.init(4 * S::groups);
  __syncthreads();

  if (group == 0) {
    fewer_registers<24>();
    if (threadIdx.x != 0) return;
    Ring<S::stages> stage;
    Ring<1> own;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
      const auto item = work.item(i);
      const int channel = item.head * width;
      wait(barriers.own_empty, own.phase ^ 1);
      arrive_and_expect(barriers.own_full, 2 * S::own_bytes);
#pragma unroll
      for (int c = 0; c < S::chunks; ++c) {
        const uint32_t to = base + S::own + c * S::own_chunk;
        load_box(to, &k_map, channel + 64 * c, item.tile * S::keys, item.pair, barriers.own_full);
        load_box(to + S::own_bytes, &v_map, channel + 64 * c, item.tile * S::keys, item.pair, barriers.own_full);
      }
      own.step();
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const uint32_t full = barriers.full + 8 * stage.at, to = base + S::ring + stage.at * S::stage_bytes;
        wait(barriers.empty + 8 * stage.at, stage.phase ^ 1);
        arrive_and_expect(full, 2 * S::tensor_bytes + S::sums_bytes);
#pragma unroll
        for (int c = 0; c < S::chunks; ++c) {
          load_box(to + c * S::chunk, &q_map, channel + 64 * c, step * S::queries, item.pair, full);
          load_box(to + S::tensor_bytes + c * S::chunk, &grad_map, channel + 64 * c, step * S::queries, item.pair,
                   full);
        }
        load_box(to + 2 * S::tensor_bytes, &sums_map, step * S::queries * 2, item.head, item.pair, full);
        stage.step();
      }
      wait(barriers.empty + 8 * stage.at, stage.phase ^ 1);
      arrive(barriers.full + 8 * stage.at);  // a stage with nothing: what consumers wait for in the last step
      stage.step();
    }
    return;
  }

  more_registers<240>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, mine = group - 1;
  Ring<S::stages> stage;
  Ring<1> own;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };
  const uint32_t first_stage = descriptor(base + S::ring), own_tile = base + S::own + mine * part_bytes;
  const uint32_t own_k = descriptor(own_tile), own_v = descriptor(own_tile + S::own_bytes);
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const auto item = work.item(i);
    constexpr int operands = S::own_in_registers ? width / 16 : 1;
    uint32_t k[operands][4], v[operands][4], weights[S::queries / 16][4], grad_scores[S::queries / 16][4];
    float s[S::queries / 2], grad_weights[S::queries / 2], grad_k[S::chunks][32], grad_v[S::chunks][32];
    wait(barriers.own_full, own.phase);
    own.step();
    if constexpr (S::own_in_registers) {
#pragma unroll
      for (int j = 0; j < operands; ++j) {
        load_operand(k[j], own_tile, 16 * warp, j);
        load_operand(v[j], own_tile + S::own_bytes, 16 * warp, j);
      }
      release(barriers.own_empty);
    }
    wait(barriers.full + 8 * stage.at, stage.phase);
    uint32_t before = 0;
    for (int step = 0; step < steps; ++step) {
      const uint32_t q = first_stage + stage.at * (S::stage_bytes / 16), grad = q + S::tensor_bytes / 16;
      const uint32_t empty = barriers.empty + 8 * stage.at;
      const uint32_t sums = base + S::ring + stage.at * S::stage_bytes + 2 * S::tensor_bytes + 16 * (lane % 4);
      const auto issue = [&](auto& d, const auto& own_operands, uint32_t own_low, uint32_t other) {
#pragma unroll
        for (int j = 0; j < width / 16; ++j) {
          const uint64_t right = whole(other + j / 4 * (S::chunk / 16) + 2 * (j % 4));
          if constexpr (S::own_in_registers) {
            multiply<T>(d, own_operands[j], right, j > 0);
          } else {
            multiply<T>(d, whole(own_low + j / 4 * (S::own_chunk / 16) + 2 * (j % 4)), right, j > 0);
          }
        }
        commit_products();
      };
      pin(s);
      pin(grad_weights);
      fence_products();
      issue(s, k, own_k, q);
      issue(grad_weights, v, own_v, grad);
      wait_products<1>();
      pin(s);
      pin(grad_k);
      pin(grad_v);
      pin(weights);
      pin(grad_scores);
      if (step > 0) release(before);
      before = empty;
      float delta[S::queries / 4];
#pragma unroll
      for (int j = 0; j < S::queries / 8; ++j) {
        const float4 of = load_shared(sums + 64 * j);  // of two neighbouring queries
        delta[2 * j] = of.y, delta[2 * j + 1] = of.w;
#pragma unroll
        for (int c = 0; c < 4; ++c) s[4 * j + c] = exp2_fast(fmaf(s[4 * j + c], p.score_scale, c & 1 ? of.z : of.x));
      }
      stage.step();
      wait(barriers.full + 8 * stage.at, stage.phase);  // keeps the powers of 2 above the wait for the product
      wait_products();
      pin(grad_weights);
#pragma unroll
      for (int j = 0; j < S::queries / 2; ++j) grad_weights[j] = s[j] * (grad_weights[j] - delta[j / 4 * 2 + (j & 1)]);
#pragma unroll
      for (int j = 0; j < S::queries / 4; ++j) {
        weights[j / 4][j % 4] = pack<T>(s[2 * j], s[2 * j + 1]);
        grad_scores[j / 4][j % 4] = pack<T>(grad_weights[2 * j], grad_weights[2 * j + 1]);
      }
      pin(grad_k);
      pin(grad_v);
      fence_products();
#pragma unroll
      for (int j = 0; j < S::queries / 16; ++j) {
#pragma unroll
        for (int c = 0; c < S::chunks; ++c)
          multiply<T, true>(grad_v[c], weights[j], whole(grad + c * (S::chunk / 16) + 128 * j), step > 0 || j > 0);
      }
#pragma unroll
      for (int j = 0; j < S::queries / 16; ++j) {
#pragma unroll
        for (int c = 0; c < S::chunks; ++c)
          multiply<T, true>(grad_k[c], grad_scores[j], whole(q + c * (S::chunk / 16) + 128 * j), step > 0 || j > 0);
      }
      commit_products();
    }
    wait_products();
    pin(grad_k);
    pin(grad_v);
    if constexpr (!S::own_in_registers) release(barriers.own_empty);
    release(before);
    release(barriers.empty + 8 * stage.at);
    stage.step();

    const int token = item.tile * S::keys + mine * 64;
#pragma unroll
    for (int c = 0; c < S::chunks; ++c)
      turn_back(grad_k[c], p, token + warp * 16 + lane / 4, 64 * c, width, p.key_scale);
    wait_stores_read();
    named_barrier<group_threads>(1 + mine);
    const uint32_t out = base + S::out + mine * 2 * S::chunks * part_bytes;
#pragma unroll
    for (int c = 0; c < S::chunks; ++c) {
      store_tile<T>(out + c * part_bytes, grad_k[c]);
      store_tile<T>(out + (S::chunks + c) * part_bytes, grad_v[c]);
    }
    fence_async_proxy();
    named_barrier<group_threads>(1 + mine);
    if (threadIdx.x % group_threads == 0) {
      store_parts<S::chunks>(&grad_k_map, out, item.head * width, token, item.pair);
      store_parts<S::chunks>(&grad_v_map, out + S::chunks * part_bytes, item.head * width, token, item.pair);
      commit_stores();
    }
  }
  wait_stores();
}

// ---- The gradient of queries: a block owns 128 or 192 queries, and loops over 64 keys

template <int width>
struct QueryLayout {
  static constexpr int chunks = width / 64, groups = width == 64 ? 3 : 2, queries = 64 * groups;
  static constexpr int threads = group_threads * (groups + 1), stages = width == 64 ? 6 : 4;
  static constexpr int producer_registers = groups == 3 ? 32 : 24, consumer_registers = groups == 3 ? 160 : 240;
  static constexpr bool own_in_registers = width == 64;
  static constexpr int own_chunk = queries * row_bytes, own_bytes = chunks * own_chunk;
  static constexpr int chunk = part_bytes, tensor_bytes = chunks * chunk, stage_bytes = 2 * tensor_bytes;
  static constexpr int own = 0, ring = own + 2 * own_bytes, out = ring + stages * stage_bytes;
  static constexpr int barriers = out + own_bytes, bytes = barriers + Barriers<stages>::bytes + tile_align;
};

template <class T, int width>
__global__ void __launch_bounds__(QueryLayout<width>::threads, 1)
    attention_grad_q(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap grad_map,
                     const __grid_constant__ CUtensorMap grad_q_map, const __grid_constant__ Backward p) {
  using S = QueryLayout<width>;
  extern __shared__ uint8_t memory[];
  const uint32_t base = aligned_shared_address(memory);
  const Barriers<S::stages> barriers(base + S::barriers);
  const AttentionWork& work = p.work;
  const int group = group_index(), steps = (work.length + 63) / 64, items = work.items();
  if (threadIdx.x == 0) barriers.init(4 * S::groups);
  __syncthreads();

  if (group == 0) {
    fewer_registers<S::producer_registers>();
    if (threadIdx.x != 0) return;
    Ring<S::stages> stage;
    Ring<1> own;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
      const auto item = work.item(i);
      const int channel = item.head * width;
      wait(barriers.own_empty, own.phase ^ 1);
      arrive_and_expect(barriers.own_full, 2 * S::own_bytes);
#pragma unroll
      for (int c = 0; c < S::chunks; ++c) {
        const uint32_t to = base + S::own + c * S::own_chunk;
        load_box(to, &q_map, channel + 64 * c, item.tile * S::queries, item.pair, barriers.own_full);
        load_box(to + S::own_bytes, &grad_map, channel + 64 * c, item.tile * S::queries, item.pair, barriers.own_full);
      }
      own.step();
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const uint32_t full = barriers.full + 8 * stage.at, to = base + S::ring + stage.at * S::stage_bytes;
        wait(barriers.empty + 8 * stage.at, stage.phase ^ 1);
        arrive_and_expect(full, S::stage_bytes);
#pragma unroll
        for (int c = 0; c < S::chunks; ++c) {
          load_box(to + c * S::chunk, &k_map, channel + 64 * c, step * 64, item.pair, full);
          load_box(to + S::tensor_bytes + c * S::chunk, &v_map, channel + 64 * c, step * 64, item.pair, full);
        }
        stage.step();
      }
      wait(barriers.empty + 8 * stage.at, stage.phase ^ 1);
      arrive(barriers.full + 8 * stage.at);
      stage.step();
    }
    return;
  }

  more_registers<S::consumer_registers>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, mine = group - 1;
  Ring<S::stages> stage;
  Ring<1> own;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };
  const uint32_t first_stage = descriptor(base + S::ring), own_tile = base + S::own + mine * part_bytes;
  const uint32_t own_q = descriptor(own_tile), own_grad = descriptor(own_tile + S::own_bytes);
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const auto item = work.item(i);
    const int token = item.tile * S::queries + mine * 64, row = token + warp * 16 + lane / 4;  // and row + 8
    float2 sums[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t head = (int64_t)item.pair * work.heads + item.head;
      sums[r] = row + 8 * r < p.rows ? p.row_sums[head * p.rows + row + 8 * r] : make_float2(0, 0);
    }
    constexpr int operands = S::own_in_registers ? width / 16 : 1;
    uint32_t q[operands][4], grad[operands][4], grad_scores[4][4];
    float s[32], grad_weights[32], grad_q[S::chunks][32];
    wait(barriers.own_full, own.phase);
    own.step();
    if constexpr (S::own_in_registers) {
#pragma unroll
      for (int j = 0; j < operands; ++j) {
        load_operand(q[j], own_tile, 16 * warp, j);
        load_operand(grad[j], own_tile + S::own_bytes, 16 * warp, j);
      }
      release(barriers.own_empty);
    }
    wait(barriers.full + 8 * stage.at, stage.phase);
    uint32_t before = 0;
    for (int step = 0; step < steps; ++step) {
      const uint32_t k = first_stage + stage.at * (S::stage_bytes / 16), v = k + S::tensor_bytes / 16;
      const uint32_t empty = barriers.empty + 8 * stage.at;
      const auto issue = [&](float (&d)[32], const auto& own_operands, uint32_t own_low, uint32_t other) {
#pragma unroll
        for (int j = 0; j < width / 16; ++j) {
          const uint64_t right = whole(other + j / 4 * (S::chunk / 16) + 2 * (j % 4));
          if constexpr (S::own_in_registers) {
            multiply<T>(d, own_operands[j], right, j > 0);
          } else {
            multiply<T>(d, whole(own_low + j / 4 * (S::own_chunk / 16) + 2 * (j % 4)), right, j > 0);
          }
        }
        commit_products();
      };
      pin(s);
      pin(grad_weights);
      fence_products();
      issue(s, q, own_q, k);
      issue(grad_weights, grad, own_grad, v);
      wait_products<1>();
      pin(s);
      pin(grad_q);
      pin(grad_scores);
      if (step > 0) release(before);
      before = empty;
#pragma unroll
      for (int j = 0; j < 32; ++j) s[j] = exp2_fast(fmaf(s[j], p.score_scale, sums[j >> 1 & 1].x));
      stage.step();
      wait(barriers.full + 8 * stage.at, stage.phase);  // keeps the powers of 2 above the wait for the product
      wait_products();
      pin(grad_weights);
#pragma unroll
      for (int j = 0; j < 32; ++j) grad_weights[j] = s[j] * (grad_weights[j] - sums[j >> 1 & 1].y);
#pragma unroll
      for (int j = 0; j < 16; ++j) grad_scores[j / 4][j % 4] = pack<T>(grad_weights[2 * j], grad_weights[2 * j + 1]);
      pin(grad_q);
      fence_products();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < S::chunks; ++c)
          multiply<T, true>(grad_q[c], grad_scores[j], whole(k + c * (S::chunk / 16) + 128 * j), step > 0 || j > 0);
      }
      commit_products();
    }
    wait_products();
    pin(grad_q);
    if constexpr (!S::own_in_registers) release(barriers.own_empty);
    release(before);
    release(barriers.empty + 8 * stage.at);
    stage.step();

#pragma unroll
    for (int c = 0; c < S::chunks; ++c) turn_back(grad_q[c], p, row, 64 * c, width, p.query_scale);
    wait_stores_read();
    named_barrier<group_threads>(1 + mine);
    const uint32_t out = base + S::out + mine * S::chunks * part_bytes;
#pragma unroll
    for (int c = 0; c < S::chunks; ++c) store_tile<T>(out + c * part_bytes, grad_q[c]);
    fence_async_proxy();
    named_barrier<group_threads>(1 + mine);
    if (threadIdx.x % group_threads == 0) {
      store_parts<S::chunks>(&grad_q_map, out, item.head * width, token, item.pair);
      commit_stores();
    }
  }
  wait_stores();
}

// ---- Launching

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel* kernel, int threads, int bytes, int blocks, cudaStream_t stream,
                   const Arguments&... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, threads, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

template <class T, int width>
cudaError_t launch_backward(const mk_expert_attention_cuda_bwd_args& a) {
  using K = KeyLayout<width>;
  using Q = QueryLayout<width>;
  const int64_t channels = a.H * a.D, rows = (a.L + 63) / 64 * 64;
  const auto type = a.dtype == MK_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cudaError_t error = cudaSuccess;
  const auto map = [&](uint64_t address, int64_t stride_pair, int64_t stride_token, int tokens) {
    const mk::BoxedTensor tensor{address, {channels, a.L, a.P}, {2 * stride_token, 2 * stride_pair}, {64, tokens, 1}};
    CUtensorMap made;
    if (!error) error = mk::make_tensor_map(&made, type, tensor, CU_TENSOR_MAP_SWIZZLE_128B);
    return made;
  };
  const auto dense = [&](uint64_t address, int tokens) { return map(address, a.L * channels, channels, tokens); };
  int multiprocessors = 0;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, (int)a.device);
  const auto grid = [&](const AttentionWork& work) {
    const int items = work.pairs * work.heads * work.tiles;
    return items < multiprocessors ? items : multiprocessors;
  };
  const mk::BoxedTensor sums{a.row_sums, {2 * rows, a.H, a.P}, {8 * rows, 8 * rows * a.H}, {2 * K::queries, 1, 1}};
  CUtensorMap sums_map;
  if (!error) {
    error = mk::make_tensor_map(&sums_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, sums, CU_TENSOR_MAP_SWIZZLE_NONE);
  }

  const float root = 1 / sqrtf((float)width);
  Backward p{{(const int64_t*)a.num_valid, (int32_t)a.P, (int32_t)a.H, (int32_t)a.L, 0},
             (const float2*)a.row_sums,
             (int)rows,
             (const float*)a.cos,
             (const float*)a.sin,
             mk::score_scale(a.dtype, width),
             root,
             mk::key_scale(a.dtype, width)};
  const cudaStream_t stream = (cudaStream_t)a.stream;
  p.work.tiles = (int32_t)((a.L + K::keys - 1) / K::keys);
  const CUtensorMap k_own = dense(a.turned_k, K::keys), v_own = map(a.v, a.v_stride_pair, a.v_stride_token, K::keys);
  const CUtensorMap q_step = dense(a.turned_q, K::queries);
  const CUtensorMap grad_step = map(a.grad, a.grad_stride_pair, a.grad_stride_token, K::queries);
  const CUtensorMap grad_k = dense(a.grad_k, 64), grad_v = dense(a.grad_v, 64), grad_q = dense(a.grad_q, 64);
  if (!error) {
    error = launch(attention_grad_kv<T, width>, K::threads, K::bytes, grid(p.work), stream, q_step, k_own, v_own,
                   grad_step, sums_map, grad_k, grad_v, p);
  }
  p.work.tiles = (int32_t)((a.L + Q::queries - 1) / Q::queries);
  const CUtensorMap q_own = dense(a.turned_q, Q::queries), k_step = dense(a.turned_k, 64);
  const CUtensorMap grad_own = map(a.grad, a.grad_stride_pair, a.grad_stride_token, Q::queries);
  const CUtensorMap v_step = map(a.v, a.v_stride_pair, a.v_stride_token, 64);
  if (!error) {
    error = launch(attention_grad_q<T, width>, Q::threads, Q::bytes, grid(p.work), stream, q_own, k_step, v_step,
                   grad_own, grad_q, p);
  }
  return error;
}

template <class T>
cudaError_t launch_width(const mk_expert_attention_cuda_bwd_args& a) {
  return a.D == 64 ? launch_backward<T, 64>(a) : launch_backward<T, 128>(a);
}

}  // namespace

cudaError_t mk::launch_backward_sm90a(const mk_expert_attention_cuda_bwd_args& a) {
  return a.dtype == MK_BF16 ? launch_width<__nv_bfloat16>(a) : launch_width<__half>(a);
}
