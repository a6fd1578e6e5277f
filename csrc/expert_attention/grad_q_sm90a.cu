// The gradient of queries, with wgmma and TMA: a block owns 128 or 192 queries, and loops over 64 keys.
#include "expert_attention/backward_sm90a.h"

namespace {

template <int width>
struct Layout : BackwardLayout<width, width == 64 ? 3 : 2, 64, width == 64 ? 6 : 4, 0, 1> {};

template <class T, int width>
__global__ void __launch_bounds__(Layout<width>::threads, 1)
    attention_grad_q(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap grad_map,
                     const __grid_constant__ CUtensorMap grad_q_map, const __grid_constant__ Backward p) {
  using S = Layout<width>;
  extern __shared__ uint8_t memory[];
  const uint32_t base = aligned_shared_address(memory);
  const mk::AttentionWork& work = p.work;
  const int group = group_index(), steps = (work.length + S::other_tokens - 1) / S::other_tokens, items = work.items();
  init_barriers<S>(base);

  if (group == 0) {
    fewer_registers<S::producer_registers>();
    if (threadIdx.x != 0) return;
    produce<S>(base, work, steps, &q_map, &grad_map, &k_map, &v_map, [](auto...) {});
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
    const int token = item.tile * S::own_tokens + mine * 64, row = token + warp * 16 + lane / 4;  // and row + 8
    float2 sums[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t head = (int64_t)item.pair * work.heads + item.head;
      sums[r] = row + 8 * r < p.rows ? p.row_sums[head * p.rows + row + 8 * r] : make_float2(0, 0);
    }
    uint32_t q[S::own_operands][4], grad[S::own_operands][4], grad_scores[4][4];
    float s[32], grad_weights[32], grad_q[S::chunks][32];
    wait(base + S::own_full, own.phase);
    own.step();
    if constexpr (S::own_in_registers) {
#pragma unroll
      for (int j = 0; j < S::own_operands; ++j) {
        load_operand(q[j], own_tile, 16 * warp, j);
        load_operand(grad[j], own_tile + S::own_bytes, 16 * warp, j);
      }
      release(base + S::own_empty);
    }
    wait(base + S::full + 8 * stage.at, stage.phase);
    uint32_t before = 0;
    for (int step = 0; step < steps; ++step) {
      const uint32_t k = first_stage + stage.at * (S::stage_bytes / 16), v = k + S::tensor_bytes / 16;
      const uint32_t empty = base + S::empty + 8 * stage.at;
      pin(s);
      pin(grad_weights);
      fence_products();
      issue_product<T, S>(s, q, own_q, k);
      issue_product<T, S>(grad_weights, grad, own_grad, v);
      wait_products<1>();
      pin(s);
      pin(grad_q);
      pin(grad_scores);
      if (step > 0) release(before);
      before = empty;
#pragma unroll
      for (int j = 0; j < 32; ++j) s[j] = exp2_fast(fmaf(s[j], p.score_scale, sums[j >> 1 & 1].x));
      stage.step();
      wait(base + S::full + 8 * stage.at, stage.phase);  // keeps the powers of 2 above the wait for the product
      wait_products();
      pin(grad_weights);
#pragma unroll
      for (int j = 0; j < 32; ++j) grad_weights[j] = s[j] * (grad_weights[j] - sums[j >> 1 & 1].y);
#pragma unroll
      for (int j = 0; j < 16; ++j) grad_scores[j / 4][j % 4] = pack<T>(grad_weights[2 * j], grad_weights[2 * j + 1]);
      pin(grad_q);
      fence_products();
      issue_sum<T, S>(grad_q, grad_scores, k, step > 0);
      commit_products();
    }
    wait_products();
    pin(grad_q);
    if constexpr (!S::own_in_registers) release(base + S::own_empty);
    release(before);
    release(base + S::empty + 8 * stage.at);
    stage.step();

    turn_back<S>(grad_q, p, row, rsqrtf(width));
    wait_stores_read();
    named_barrier<group_threads>(1 + mine);
    const uint32_t out = base + S::out + mine * S::chunks * part_bytes;
    write_parts<S, T>(out, grad_q);
    fence_async_proxy();
    named_barrier<group_threads>(1 + mine);
    if (threadIdx.x % group_threads == 0) {
      store_parts<S>(&grad_q_map, out, item.head * width, token, item.pair);
      commit_stores();
    }
  }
  wait_stores();
}

template <class T, int width>
cudaError_t launch(const mk_expert_attention_cuda_bwd_args& a) {
  using S = Layout<width>;
  const Backward p = backward_of(a, S::own_tokens);
  CUtensorMap q, k, v, grad, grad_q;
  int blocks = 0;
  cudaError_t error = mk::map_tokens(&q, a, a.turned_q, S::own_tokens);
  if (!error) error = mk::map_tokens(&k, a, a.turned_k, S::other_tokens);
  if (!error) error = mk::map_tokens(&v, a, a.v, a.v_stride_pair, a.v_stride_token, S::other_tokens);
  if (!error) error = mk::map_tokens(&grad, a, a.grad, a.grad_stride_pair, a.grad_stride_token, S::own_tokens);
  if (!error) error = mk::map_tokens(&grad_q, a, a.grad_q, 64);
  const auto kernel = attention_grad_q<T, width>;
  if (!error) error = mk::persistent_blocks(&blocks, kernel, S::bytes, p.work.bound(), a.device);
  if (error) return error;
  kernel<<<blocks, S::threads, S::bytes, (cudaStream_t)a.stream>>>(q, k, v, grad, grad_q, p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_width(const mk_expert_attention_cuda_bwd_args& a) {
  return a.D == 64 ? launch<T, 64>(a) : launch<T, 128>(a);
}

}  // namespace

cudaError_t mk::launch_grad_q_sm90a(const mk_expert_attention_cuda_bwd_args& a) {
  return a.dtype == MK_BF16 ? launch_width<__nv_bfloat16>(a) : launch_width<__half>(a);
}
