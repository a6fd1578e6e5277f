// Wide queries: fp32 cannot hold their scores or sums of values, or cannot tell them apart, so fp64 does. The main
// kernels mark them by a log-sum-exp that is large, infinite or NaN, which inputs of NaN also cause. The host does not
// know whether there are any, so these kernels are always launched, and end at once if there are none. Forward, they
// compute single queries again; backward, all gradients of a head that has one.
//
// Slow: a warp computes one row after another. Sums are written as fused multiply-adds, so that a score has the same
// bits wherever it is computed.
#include "expert_attention/expert_attention_cuda.h"

namespace {

constexpr int warps = 8, threads = 32 * warps, rows_per_block = 64;

struct Tokens {
  const void* x;
  int64_t stride_pair, stride_token;
};

struct Tables {
  const float *cos, *sin;
};

// The channels of a lane: `n` neighbours, which begin with the first of a pair.
template <class T, int n>
struct Row {
  double x[n] = {};

  Row() = default;
  __device__ Row(const Tokens& t, int64_t pair, int64_t token, int head) {
    const T* const from = static_cast<const T*>(t.x) + pair * t.stride_pair + token * t.stride_token +
                          (int64_t)head * 32 * n + threadIdx.x % 32 * n;
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = mk::to_float(from[i]);
  }
  // rope, or its adjoint.
  __device__ void turn(const Tables& tables, int64_t token, bool adjoint = false) {
    const int64_t at = token * 32 * n + threadIdx.x % 32 * n;
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const double a = x[i], b = x[i + 1], sin0 = tables.sin[at + i], sin1 = tables.sin[at + i + 1];
      x[i] = fma(a, (double)tables.cos[at + i], adjoint ? b * sin1 : -(b * sin0));
      x[i + 1] = fma(b, (double)tables.cos[at + i + 1], adjoint ? -(a * sin0) : a * sin1);
    }
  }
  __device__ void scale(double factor) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] *= factor;
  }
  __device__ void add(double factor, const Row& other) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = fma(factor, other.x[i], x[i]);
  }
  __device__ void store(void* first) const {
    T* const to = static_cast<T*>(first) + threadIdx.x % 32 * n;
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = mk::from_float<T>((float)x[i]);
  }
  // Over all channels of the head, the same number in every lane.
  __device__ double dot(const Row& other) const {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) sum = fma(x[i], other.x[i], sum);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
  }
};

// The scores of a query so far: the largest, and the sum of the exponentials relative to it.
struct Softmax {
  double top = -INFINITY, sum = 0;
  // One more key: its weight, and what older terms have to be multiplied by.
  __device__ void add(double score, double& weight, double& shrink) {
    const double now = isnan(score) ? score : fmax(top, score);  // fmax passes NaN over
    shrink = exp(top - now), weight = exp(score - now);
    sum = sum * shrink + weight;
    top = now;
  }
};

struct Inputs {
  mk::AttentionWork work;
  Tokens q, k, v;
  Tables tables;
};

// The pair, head and rows of a block, with its inputs.
template <class T, int width>
struct Block {
  using Channels = Row<T, width / 32>;
  const Inputs& p;
  int32_t pair, head, first;
  double root;

  __device__ explicit Block(const Inputs& inputs) : p(inputs), root(1 / sqrt((double)width)) {
    const auto item = p.work.item(blockIdx.x);
    pair = item.pair, head = item.head, first = item.tile * rows_per_block;
  }
  __device__ bool is_padding() const { return pair >= p.work.valid_pairs(); }
  __device__ int64_t head_index() const { return (int64_t)pair * p.work.heads + head; }
  // Where the channels of a token begin in a contiguous tensor.
  __device__ int64_t offset(int token) const {
    return (((int64_t)pair * p.work.length + token) * p.work.heads + head) * width;
  }
  __device__ Channels query(int token) const {
    Channels row(p.q, pair, token, head);
    row.turn(p.tables, token);
    row.scale(root);
    return row;
  }
  __device__ Channels key(int token) const {
    Channels row(p.k, pair, token, head);
    row.turn(p.tables, token);
    return row;
  }
  __device__ Channels value(int token) const { return Channels(p.v, pair, token, head); }
  // Calls body(row) for every row of this warp.
  template <class Body>
  __device__ void for_each_row(const Body& body) const {
    for (int row = first + threadIdx.x / 32; row < min(first + rows_per_block, p.work.length); row += warps) body(row);
  }
};

// Rewrites the results of wide queries; zeros for padding. `out` is contiguous.
template <class T, int width>
__global__ void __launch_bounds__(threads) wide_forward(const __grid_constant__ Inputs p, T* out, float* lse) {
  const Block<T, width> block(p);
  using Channels = typename Block<T, width>::Channels;
  lse += block.head_index() * p.work.length;
  const bool padding = block.is_padding();
  block.for_each_row([&](int row) {
    if (padding) {
      Channels().store(out + block.offset(row));
      if (threadIdx.x % 32 == 0) lse[row] = 0;
    } else if (mk::is_wide(lse[row])) {
      const Channels q = block.query(row);
      Channels sum;
      Softmax softmax;
      for (int key = 0; key < p.work.length; ++key) {
        double weight, shrink;
        softmax.add(q.dot(block.key(key)), weight, shrink);
        sum.scale(shrink);
        sum.add(weight, block.value(key));
      }
      sum.scale(1 / softmax.sum);
      sum.store(out + block.offset(row));
    }
  });
}

struct Gradients {
  Tokens grad;
  const int32_t* wide_heads;
  double* sums;     // (P, H, 3, L): of each query the largest score, the sum relative to it, and delta
  void *q, *k, *v;  // contiguous, written
};

// grad_q of heads with wide queries, and what wide_grad_kv needs of their queries; zeros for padding.
template <class T, int width>
__global__ void __launch_bounds__(threads)
    wide_grad_q(const __grid_constant__ Inputs p, const __grid_constant__ Gradients g) {
  const Block<T, width> block(p);
  using Channels = typename Block<T, width>::Channels;
  if (block.is_padding()) {
    block.for_each_row([&](int row) {
      for (void* const to : {g.q, g.k, g.v}) Channels().store(static_cast<T*>(to) + block.offset(row));
    });
    return;
  }
  if (!g.wide_heads[block.head_index()]) return;
  double* const sums = g.sums + block.head_index() * 3 * p.work.length;
  block.for_each_row([&](int row) {
    const Channels q = block.query(row), grad(g.grad, block.pair, row, block.head);
    Softmax softmax;
    double delta = 0;
    for (int key = 0; key < p.work.length; ++key) {
      double weight, shrink;
      softmax.add(q.dot(block.key(key)), weight, shrink);
      delta = delta * shrink + weight * grad.dot(block.value(key));
    }
    delta /= softmax.sum;
    Channels sum;
    for (int key = 0; key < p.work.length; ++key) {
      const Channels k = block.key(key);
      const double weight = exp(q.dot(k) - softmax.top) / softmax.sum;
      sum.add(weight * (grad.dot(block.value(key)) - delta), k);
    }
    sum.scale(block.root);
    sum.turn(p.tables, row, true);
    sum.store(static_cast<T*>(g.q) + block.offset(row));
    if (threadIdx.x % 32 == 0) {
      sums[row] = softmax.top, sums[p.work.length + row] = softmax.sum, sums[2 * p.work.length + row] = delta;
    }
  });
}

// grad_k and grad_v of heads with wide queries.
template <class T, int width>
__global__ void __launch_bounds__(threads)
    wide_grad_kv(const __grid_constant__ Inputs p, const __grid_constant__ Gradients g) {
  const Block<T, width> block(p);
  using Channels = typename Block<T, width>::Channels;
  if (block.is_padding() || !g.wide_heads[block.head_index()]) return;
  const double* const sums = g.sums + block.head_index() * 3 * p.work.length;
  block.for_each_row([&](int row) {
    const Channels k = block.key(row), v = block.value(row);
    Channels grad_k, grad_v;
    for (int query = 0; query < p.work.length; ++query) {
      const Channels q = block.query(query), grad(g.grad, block.pair, query, block.head);
      const double weight = exp(q.dot(k) - sums[query]) / sums[p.work.length + query];
      grad_v.add(weight, grad);
      grad_k.add(weight * (grad.dot(v) - sums[2 * p.work.length + query]), q);
    }
    grad_k.turn(p.tables, row, true);
    grad_k.store(static_cast<T*>(g.k) + block.offset(row));
    grad_v.store(static_cast<T*>(g.v) + block.offset(row));
  });
}

// ---- Launching

template <class Args>
Inputs inputs_of(const Args& a) {
  const int32_t tiles = (int32_t)((a.L + rows_per_block - 1) / rows_per_block);
  return {{(const int64_t*)a.num_valid, (int32_t)a.P, (int32_t)a.H, (int32_t)a.L, tiles},
          {(const void*)a.q, a.q_stride_pair, a.q_stride_token},
          {(const void*)a.k, a.k_stride_pair, a.k_stride_token},
          {(const void*)a.v, a.v_stride_pair, a.v_stride_token},
          {(const float*)a.cos, (const float*)a.sin}};
}

int blocks_for(const Inputs& p) { return p.work.pairs * p.work.heads * p.work.tiles; }

template <class T, int width>
cudaError_t launch(const mk_expert_attention_cuda_fwd_args& a) {
  const Inputs p = inputs_of(a);
  wide_forward<T, width><<<blocks_for(p), threads, 0, (cudaStream_t)a.stream>>>(p, (T*)a.out, (float*)a.lse);
  return cudaGetLastError();
}

template <class T, int width>
cudaError_t launch(const mk_expert_attention_cuda_bwd_args& a) {
  const Inputs p = inputs_of(a);
  const Gradients g{{(const void*)a.grad, a.grad_stride_pair, a.grad_stride_token},
                    (const int32_t*)a.wide_heads,
                    (double*)a.wide_sums,
                    (void*)a.grad_q,
                    (void*)a.grad_k,
                    (void*)a.grad_v};
  wide_grad_q<T, width><<<blocks_for(p), threads, 0, (cudaStream_t)a.stream>>>(p, g);
  if (const cudaError_t error = cudaGetLastError()) return error;
  wide_grad_kv<T, width><<<blocks_for(p), threads, 0, (cudaStream_t)a.stream>>>(p, g);
  return cudaGetLastError();
}

template <class Args>
cudaError_t launch_any(const Args& a) {
  if (a.dtype == MK_BF16) return a.D == 64 ? launch<__nv_bfloat16, 64>(a) : launch<__nv_bfloat16, 128>(a);
  return a.D == 64 ? launch<__half, 64>(a) : launch<__half, 128>(a);
}

}  // namespace

cudaError_t mk::launch_wide_forward(const mk_expert_attention_cuda_fwd_args& a) { return launch_any(a); }
cudaError_t mk::launch_wide_backward(const mk_expert_attention_cuda_bwd_args& a) { return launch_any(a); }
