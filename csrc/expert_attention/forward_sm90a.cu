// Attention, forward, with wgmma and TMA. A block has one producer thread, which fills a ring of tiles of keys and
// values, and two or three groups of consumers with 64 queries each. It works off one item after another.
//
// A step of a consumer: issue scores(j) = q k(j)^T; issue out += weights(j - 1) v(j - 1); wait for the scores; while
// the second product runs, weights(j) = 2^scores(j). The scores of the next item are issued before the results of this
// one are written. The last tile of keys, which may be cut, comes first, outside of the loop.
#include "common/hopper.h"
#include "expert_attention/expert_attention_cuda.h"

namespace {

using namespace mk::hopper;
using mk::AttentionWork;

enum Range { none = MK_RANGE_NONE, first = MK_RANGE_FIRST, online = MK_RANGE_ONLINE, polynomial = MK_RANGE_POLYNOMIAL };
constexpr float least_sum = 0.5f, largest_sum = 0x1p64f;  // weights and their products with values keep their digits

// Tiles that have to be computed again: how many, and which. A flag per item keeps each from being listed twice.
struct Retry {
  int32_t *count, *items, *listed;
};

struct Forward {
  AttentionWork work;
  Retry retry;
  float* lse;
  float scale;
  bool again;  // the items are those of the list
};

// What depends on the head width. Offsets are from the aligned beginning of shared memory.
template <int width>
struct Layout {
  static constexpr int chunks = width / 64;  // tiles have rows of 64 channels
  static constexpr int groups = width == 64 ? 3 : 2, slots = width == 64 ? 6 : 4;
  static constexpr int queries = 64 * groups, keys = 128;
  static constexpr int threads = group_threads * (groups + 1);
  static constexpr int producer_registers = groups == 3 ? 32 : 24, consumer_registers = groups == 3 ? 160 : 240;
  static constexpr int part_bytes = 64 * row_bytes;  // 64 queries, 64 channels
  static constexpr int q_chunk = queries * row_bytes, kv_chunk = keys * row_bytes;
  static constexpr int q_bytes = chunks * q_chunk, kv_bytes = chunks * kv_chunk;
  static constexpr int q = 0, out = q + 2 * q_bytes, kv = out + q_bytes, barriers = kv + slots * kv_bytes;
  static constexpr int q_full = barriers, q_empty = q_full + 16, full = q_empty + 16, empty = full + 8 * slots;
  static constexpr int bytes = empty + 8 * slots + tile_align;  // room to align the beginning
};

// 2^x by additions and multiplications: x = n + f with |f| <= 1/2. The relative error is 1e-4, a twentieth of the
// rounding to bf16 that follows.
__device__ inline float exp2_polynomial(float x) {
  x = fmaxf(x, -126.0f);
  const float shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
  const float y = fmaf(fmaf(fmaf(f, 0.0559219f, 0.2426094f), f, 0.6931208f), f, 0.9999245f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(shifted) << 23));
}

// A thread has two rows of the scores: those whose index has bit 1 clear, and set.
template <int n>
__device__ void raise_maximum(float (&top)[2], const float (&s)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) top[i >> 1 & 1] = fmaxf(top[i >> 1 & 1], s[i]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
    top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
  }
}

// Scores become weights, which are added to the sums. Two sums a row: the additions wait less for each other.
template <Range range, int n>
__device__ void weights(float (&s)[n], float (&sum)[4], const float (&subtracted)[2], float scale) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    constexpr bool as_they_are = range == none || range == polynomial;
    const float x = as_they_are ? s[i] : fmaf(s[i], scale, -subtracted[i >> 1 & 1]);
    s[i] = range == polynomial && i % 4 == 3 ? exp2_polynomial(x) : exp2_fast(x);
    sum[i & 3] += s[i];
  }
}

// The left operand of the next product. Not while a product is in flight: ptxas would wait for all of them (C7513).
template <class T, int n>
__device__ void pack_weights(uint32_t (&p)[n / 8][4], const float (&s)[n]) {
#pragma unroll
  for (int i = 0; i < n / 2; ++i) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
}

// Issues s = q k^T.
template <class T, class S>
__device__ void score(float (&s)[S::keys / 2], uint32_t q, uint32_t k) {
#pragma unroll
  for (int c = 0; c < S::chunks; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      multiply<T>(s, whole(q + c * (S::q_chunk / 16) + 2 * i), whole(k + c * (S::kv_chunk / 16) + 2 * i),
                  c > 0 || i > 0);
  }
  commit_products();
}

// Issues o = p v, or o += p v.
template <class T, class S>
__device__ void accumulate(float (&o)[S::chunks][32], const uint32_t (&p)[S::keys / 16][4], uint32_t v, bool add) {
#pragma unroll
  for (int j = 0; j < S::keys / 16; ++j) {
#pragma unroll
    for (int c = 0; c < S::chunks; ++c)
      multiply<T, true>(o[c], p[j], whole(v + c * (S::kv_chunk / 16) + 128 * j), j > 0 || add);
  }
  commit_products();
}

template <class T, int width, Range range>
__global__ void __launch_bounds__(Layout<width>::threads, 1)
    attention_forward(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
                      const __grid_constant__ Forward p) {
  using S = Layout<width>;
  extern __shared__ uint8_t memory[];
  const uint32_t base = aligned_shared_address(memory);
  const AttentionWork& work = p.work;
  const int steps = (work.length + S::keys - 1) / S::keys, group = group_index();
  const int items = p.again ? *p.retry.count : work.items();
  const auto item_at = [&](int i) { return p.again ? p.retry.items[i] : i; };

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      init_barrier(base + S::q_full + 8 * i, 1), init_barrier(base + S::q_empty + 8 * i, 4 * S::groups);
    }
    for (int i = 0; i < S::slots; ++i) {
      init_barrier(base + S::full + 8 * i, 1), init_barrier(base + S::empty + 8 * i, 4 * S::groups);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (group == 0) {
    fewer_registers<S::producer_registers>();
    if (threadIdx.x != 0) return;
    Ring<S::slots> slot;
    Ring<2> q_slot;
    arrive(base + S::full);  // consumers take slots in pairs; the first one of all stays empty
    slot.step();
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
      const auto item = work.item(item_at(i));
      const auto load = [&](const CUtensorMap* map, int step) {
        const uint32_t barrier = base + S::full + 8 * slot.at, to = base + S::kv + slot.at * S::kv_bytes;
        wait(base + S::empty + 8 * slot.at, slot.phase ^ 1);
        arrive_and_expect(barrier, S::kv_bytes);
#pragma unroll
        for (int c = 0; c < S::chunks; ++c) {
          load_box(to + c * S::kv_chunk, map, item.head * width + 64 * c, step * S::keys, item.pair, barrier);
        }
        slot.step();
      };
      const uint32_t barrier = base + S::q_full + 8 * q_slot.at, to = base + S::q + q_slot.at * S::q_bytes;
      wait(base + S::q_empty + 8 * q_slot.at, q_slot.phase ^ 1);
      arrive_and_expect(barrier, S::q_bytes);
#pragma unroll
      for (int c = 0; c < S::chunks; ++c) {
        load_box(to + c * S::q_chunk, &q_map, item.head * width + 64 * c, item.tile * S::queries, item.pair, barrier);
      }
      q_slot.step();
      int before = steps - 1;
      load(&k_map, before);
#pragma unroll 1
      for (int step = 0; step < steps - 1; ++step) {
        load(&k_map, step);
        load(&v_map, before);
        before = step;
      }
      load(&v_map, before);
    }
    return;
  }

  more_registers<S::consumer_registers>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, mine = group - 1;
  const uint32_t out_tile = base + S::out + mine * S::chunks * S::part_bytes;
  const uint32_t first_q = descriptor(base + S::q + mine * S::part_bytes), first_kv = descriptor(base + S::kv);
  // A pair of slots holds the keys of a step and the values of the one before; between two items, the last values of
  // one and the first keys of the next.
  Ring<S::slots / 2> pair;
  Ring<2> q_slot;
  float s[S::keys / 2], o[S::chunks][32], sum[4], top[2], subtracted[2];
  uint32_t a[S::keys / 16][4];
  const auto wait_full = [&](int second) { wait(base + S::full + 16 * pair.at + 8 * second, pair.phase); };
  const auto q_at = [&](int place) { return first_q + place * (S::q_bytes / 16); };
  const auto kv_at = [&](int place) { return first_kv + place * (S::kv_bytes / 16); };
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) arrive(barrier);
  };
  int i = blockIdx.x;
  if (i >= items) return;
  wait(base + S::q_full, 0);
  wait_full(1);
  fence_products();
  score<T, S>(s, first_q, kv_at(1));
  wait_products();
  pin(s);
  release(base + S::empty);
  for (;; i += gridDim.x) {
    const int index = item_at(i);
    const auto item = work.item(index);
    const uint32_t q = q_at(q_slot.at);
    sum[0] = sum[1] = sum[2] = sum[3] = 0;
    top[0] = top[1] = __int_as_float(0xff800000);  // -infinity

    release(base + S::empty + 16 * pair.at + 8);
    pair.step();
    if (const int cut = work.length % S::keys) {
#pragma unroll
      for (int j = 0; j < S::keys / 2; ++j) {
        if (j / 4 * 8 + 2 * (lane % 4) + (j & 1) >= cut) s[j] = __int_as_float(0xff800000);
      }
    }
    if constexpr (range == first || range == online) {
      raise_maximum(top, s);
      subtracted[0] = top[0] * p.scale, subtracted[1] = top[1] * p.scale;
    }
    weights<range>(s, sum, subtracted, p.scale);
    pack_weights<T>(a, s);
    wait_full(0);

    for (int step = 1; step < steps; ++step) {
      const int slot = 2 * pair.at;
      pin(s);
      fence_products();
      score<T, S>(s, q, kv_at(slot));
      wait_full(1);
      fence_products();
      accumulate<T, S>(o, a, kv_at(slot + 1), step > 1);
      pair.step();
      wait_products<1>();
      pin(s);
      release(base + S::empty + 8 * slot);
      float shrink[2];
      if constexpr (range == online) {
        raise_maximum(top, s);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float now = top[r] * p.scale;
          shrink[r] = exp2_fast(subtracted[r] - now), subtracted[r] = now;
          sum[2 * r] *= shrink[r], sum[2 * r + 1] *= shrink[r];
        }
      }
      weights<range>(s, sum, subtracted, p.scale);
      wait_full(0);  // here and on every path: ptxas would move the powers of 2 behind the wait for the product
      wait_products();
      pin(o);
      pin(a);
      release(base + S::empty + 8 * slot + 8);
      if constexpr (range == online) {
#pragma unroll
        for (int c = 0; c < S::chunks; ++c) {
#pragma unroll
          for (int j = 0; j < 32; ++j) o[c][j] *= shrink[j >> 1 & 1];
        }
      }
      pack_weights<T>(a, s);
    }

    release(base + S::q_empty + 8 * q_slot.at);
    q_slot.step();
    const int slot = 2 * pair.at;
    const auto finish = [&] {
      pin(o);
      release(base + S::empty + 8 * slot);
      float total[2], inverse[2];
      bool fits = true;
      const int row = item.tile * S::queries + mine * 64 + warp * 16 + lane / 4;  // and row + 8
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float infinite = 0;  // NaN if a result is not finite, and so is the total then
#pragma unroll
        for (int c = 0; c < S::chunks; ++c) {
#pragma unroll
          for (int j = 0; j < 32; ++j) {
            if ((j >> 1 & 1) == r) infinite = fmaf(o[c][j], 0.0f, infinite);
          }
        }
        total[r] = sum[2 * r] + sum[2 * r + 1] + infinite;
        total[r] += __shfl_xor_sync(~0u, total[r], 1);
        total[r] += __shfl_xor_sync(~0u, total[r], 2);
        inverse[r] = 1 / total[r];
        fits = fits && (row + 8 * r >= work.length || (total[r] >= least_sum && total[r] <= largest_sum));
      }
      if (range != online && __any_sync(~0u, !fits) && lane == 0 && atomicExch(p.retry.listed + index, 1) == 0) {
        p.retry.items[atomicAdd(p.retry.count, 1)] = index;
      }
#pragma unroll
      for (int c = 0; c < S::chunks; ++c) {
#pragma unroll
        for (int j = 0; j < 32; ++j) o[c][j] *= inverse[j >> 1 & 1];
      }
      wait_stores_read();  // for the thread that issued the last ones; the others have none
      named_barrier<group_threads>(1 + mine);
#pragma unroll
      for (int c = 0; c < S::chunks; ++c) store_tile<T>(out_tile + c * S::part_bytes, o[c]);
      fence_async_proxy();
      named_barrier<group_threads>(1 + mine);
      if (threadIdx.x % group_threads == 0) {
#pragma unroll
        for (int c = 0; c < S::chunks; ++c) {
          store_box(&out_map, out_tile + c * S::part_bytes, item.head * width + 64 * c,
                    item.tile * S::queries + mine * 64, item.pair);
        }
        commit_stores();
      }
      if (lane % 4 == 0) {
        float* const lse = p.lse + ((int64_t)item.pair * work.heads + item.head) * work.length;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          constexpr bool as_they_are = range == none || range == polynomial;
          if (row + 8 * r < work.length) lse[row + 8 * r] = log2f(total[r]) + (as_they_are ? 0 : subtracted[r]);
        }
      }
    };
    if (i + (int)gridDim.x >= items) {
      pin(o);
      fence_products();
      accumulate<T, S>(o, a, kv_at(slot), steps > 1);
      wait_products();
      finish();
      break;
    }
    wait(base + S::q_full + 8 * q_slot.at, q_slot.phase);
    wait_full(1);
    pin(o);  // no branch from here to the wait: ptxas would let the second product wait for the first (C7514)
    fence_products();
    accumulate<T, S>(o, a, kv_at(slot), steps > 1);
    score<T, S>(s, q_at(q_slot.at), kv_at(slot + 1));
    wait_products<1>();
    finish();
    wait_products();
    pin(s);
  }
  wait_stores();
}

// ---- Launching

struct Maps {
  CUtensorMap q, k, v, out;
};

template <class T, int width, Range range>
cudaError_t launch(const Maps& maps, Forward p, bool again, int64_t device, cudaStream_t stream) {
  using S = Layout<width>;
  const auto kernel = attention_forward<T, width, range>;
  int blocks = 0;
  const cudaError_t error = mk::persistent_blocks(&blocks, kernel, S::bytes, p.work.bound(), device);
  if (error) return error;
  p.again = again;
  kernel<<<blocks, S::threads, S::bytes, stream>>>(maps.q, maps.k, maps.v, maps.out, p);
  return cudaGetLastError();
}

template <int width>
cudaError_t launch_width(const mk_expert_attention_cuda_fwd_args& a) {
  using S = Layout<width>;
  const int64_t tiles = (a.L + S::queries - 1) / S::queries;
  Maps maps;
  cudaError_t error = mk::map_tokens(&maps.q, a, a.turned_q, S::queries);
  if (!error) error = mk::map_tokens(&maps.k, a, a.turned_k, S::keys);
  if (!error) error = mk::map_tokens(&maps.v, a, a.v, a.v_stride_pair, a.v_stride_token, S::keys);
  if (!error) error = mk::map_tokens(&maps.out, a, a.out, 64);
  if (error) return error;

  int32_t* const retry = (int32_t*)a.retry;
  const Forward p{{(const int64_t*)a.num_valid, (int32_t)a.P, (int32_t)a.H, (int32_t)a.L, (int32_t)tiles},
                  {retry, retry + 1, retry + 1 + a.P * a.H * tiles},
                  (float*)a.lse,
                  mk::score_scale(a.dtype, a.D),
                  false};
  const cudaStream_t stream = (cudaStream_t)a.stream;
  if (a.dtype == MK_F16) return launch<__half, width, online>(maps, p, false, a.device, stream);
  using T = __nv_bfloat16;
  switch (a.range) {
    case MK_RANGE_ONLINE:
      return launch<T, width, online>(maps, p, false, a.device, stream);
    case MK_RANGE_FIRST:
      error = launch<T, width, first>(maps, p, false, a.device, stream);
      break;
    case MK_RANGE_POLYNOMIAL:
      error = launch<T, width, polynomial>(maps, p, false, a.device, stream);
      break;
    default:
      error = launch<T, width, none>(maps, p, false, a.device, stream);
  }
  return error ? error : launch<T, width, online>(maps, p, true, a.device, stream);
}

}  // namespace

cudaError_t mk::launch_forward_sm90a(const mk_expert_attention_cuda_fwd_args& a) {
  return a.D == 64 ? launch_width<64>(a) : launch_width<128>(a);
}
