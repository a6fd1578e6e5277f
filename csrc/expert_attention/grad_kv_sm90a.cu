// The gradients of keys and values, with wgmma and TMA: a block owns 128 keys, and loops over queries.
#include "expert_attention/backward_sm90a.h"

namespace {

// The queries of a step are as many as the registers hold.
template <int width>
struct Layout : BackwardLayout<width, 2, width == 64 ? 64 : 32, width == 64 ? 6 : 5, (width == 64 ? 64 : 32) * 8, 2> {};

template <class T, int width>
__global__ void __launch_bounds__(Layout<width>::threads, 1)
    attention_grad_kv(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap grad_map,
                      const __grid_constant__ CUtensorMap sums_map, const __grid_constant__ CUtensorMap grad_k_map,
                      const __grid_constant__ CUtensorMap grad_v_map, const __grid_constant__ Backward p,
                      float key_scale) {
  using S = Layout<width>;
  extern __shared__ uint8_t memory[];
  const uint32_t base = aligned_shared_address(memory);
  const mk::AttentionWork& work = p.work;
  const int group = group_index(), steps = (work.length + S::other_tokens - 1) / S::other_tokens, items = work.items();
  init_barriers<S>(base);

  if (group == 0) {
    fewer_registers<S::producer_registers>();
    if (threadIdx.x != 0) return;
    const auto load_sums = [&](uint32_t to, const mk::AttentionWork::Item& item, int step, uint32_t barrier) {
      load_box(to, &sums_map, step * S::other_tokens * 2, item.head, item.pair, barrier);
    };
    produce<S>(base, work, steps, &k_map, &v_map, &q_map, &grad_map, load_sums);
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
  const uint32_t own_k = descriptor(own_tile), own_v = descriptor(own_tile + S::own_bytes);
  for (int i = blockIdx.x; i < items; i += gridDim.x) {
    const auto item = work.item(i);
    constexpr int queries = S::other_tokens;
    uint32_t k[S::own_operands][4], v[S::own_operands][4], weights[queries / 16][4], grad_scores[queries / 16][4];
    float s[queries / 2], grad_weights[queries / 2], grad_k[S::chunks][32], grad_v[S::chunks][32];
    wait(base + S::own_full, own.phase);
    own.step();
    if constexpr (S::own_in_registers) {
#pragma unroll
      for (int j = 0; j < S::own_operands; ++j) {
        load_operand(k[j], own_tile, 16 * warp, j);
        load_operand(v[j], own_tile + S::own_bytes, 16 * warp, j);
      }
      release(base + S::own_empty);
    }
    wait(base + S::full + 8 * stage.at, stage.phase);
    uint32_t before = 0;
    for (int step = 0; step < steps; ++step) {
      const uint32_t q = first_stage + stage.at * (S::stage_bytes / 16), grad = q + S::tensor_bytes / 16;
      const uint32_t empty = base + S::empty + 8 * stage.at;
      const uint32_t sums = base + S::ring + stage.at * S::stage_bytes + 2 * S::tensor_bytes + 16 * (lane % 4);
      pin(s);
      pin(grad_weights);
      fence_products();
      issue_product<T, S>(s, k, own_k, q);
      issue_product<T, S>(grad_weights, v, own_v, grad);
      wait_products<1>();
      pin(s);
      pin(grad_k);
      pin(grad_v);
      pin(weights);
      pin(grad_scores);
      if (step > 0) release(before);
      before = empty;
      float delta[queries / 4];
#pragma unroll
      for (int j = 0; j < queries / 8; ++j) {
        const float4 of = load_shared(sums + 64 * j);  // -lse and delta of two neighbouring queries
        delta[2 * j] = of.y, delta[2 * j + 1] = of.w;
#pragma unroll
        for (int c = 0; c < 4; ++c) s[4 * j + c] = exp2_fast(fmaf(s[4 * j + c], p.score_scale, c & 1 ? of.z : of.x));
      }
      stage.step();
      wait(base + S::full + 8 * stage.at, stage.phase);  // keeps the powers of 2 above the wait for the product
      wait_products();
      pin(grad_weights);
#pragma unroll
      for (int j = 0; j < queries / 2; ++j) grad_weights[j] = s[j] * (grad_weights[j] - delta[j / 4 * 2 + (j & 1)]);
#pragma unroll
      for (int j = 0; j < queries / 4; ++j) {
        weights[j / 4][j % 4] = pack<T>(s[2 * j], s[2 * j + 1]);
        grad_scores[j / 4][j % 4] = pack<T>(grad_weights[2 * j], grad_weights[2 * j + 1]);
      }
      pin(grad_k);
      pin(grad_v);
      fence_products();
      issue_sum<T, S>(grad_v, weights, grad, step > 0);
      issue_sum<T, S>(grad_k, grad_scores, q, step > 0);
      commit_products();
    }
    wait_products();
    pin(grad_k);
    pin(grad_v);
    if constexpr (!S::own_in_registers) release(base + S::own_empty);
    release(before);
    release(base + S::empty + 8 * stage.at);
    stage.step();

    const int token = item.tile * S::own_tokens + mine * 64;
    turn_back<S>(grad_k, p, token + warp * 16 + lane / 4, key_scale);
    wait_stores_read();
    named_barrier<group_threads>(1 + mine);
    const uint32_t out = base + S::out + mine * 2 * S::chunks * part_bytes;
    write_parts<S, T>(out, grad_k);
    write_parts<S, T>(out + S::chunks * part_bytes, grad_v);
    fence_async_proxy();
    named_barrier<group_threads>(1 + mine);
    if (threadIdx.x % group_threads == 0) {
      store_parts<S>(&grad_k_map, out, item.head * width, token, item.pair);
      store_parts<S>(&grad_v_map, out + S::chunks * part_bytes, item.head * width, token, item.pair);
      commit_stores();
    }
  }
  wait_stores();
}

template <class T, int width>
cudaError_t launch(const mk_expert_attention_cuda_bwd_args& a) {
  using S = Layout<width>;
  const Backward p = backward_of(a, S::own_tokens);
  const int64_t rows = p.rows;
  const mk::BoxedTensor sums{a.row_sums, {2 * rows, a.H, a.P}, {8 * rows, 8 * rows * a.H}, {2 * S::other_tokens, 1, 1}};
  CUtensorMap q, k, v, grad, row_sums, grad_k, grad_v;
  int blocks = 0;
  cudaError_t error = mk::map_tokens(&q, a, a.turned_q, S::other_tokens);
  if (!error) error = mk::map_tokens(&k, a, a.turned_k, S::own_tokens);
  if (!error) error = mk::map_tokens(&v, a, a.v, a.v_stride_pair, a.v_stride_token, S::own_tokens);
  if (!error) error = mk::map_tokens(&grad, a, a.grad, a.grad_stride_pair, a.grad_stride_token, S::other_tokens);
  if (!error) error = mk::make_tensor_map(&row_sums, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, sums, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (!error) error = mk::map_tokens(&grad_k, a, a.grad_k, 64);
  if (!error) error = mk::map_tokens(&grad_v, a, a.grad_v, 64);
  const auto kernel = attention_grad_kv<T, width>;
  if (!error) error = mk::persistent_blocks(&blocks, kernel, S::bytes, p.work.bound(), a.device);
  if (error) return error;
  kernel<<<blocks, S::threads, S::bytes, (cudaStream_t)a.stream>>>(q, k, v, grad, row_sums, grad_k, grad_v, p,
                                                                   mk::key_scale(a.dtype, width));
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_width(const mk_expert_attention_cuda_bwd_args& a) {
  return a.D == 64 ? launch<T, 64>(a) : launch<T, 128>(a);
}

}  // namespace

cudaError_t mk::launch_grad_kv_sm90a(const mk_expert_attention_cuda_bwd_args& a) {
  return a.dtype == MK_BF16 ? launch_width<__nv_bfloat16>(a) : launch_width<__half>(a);
}
