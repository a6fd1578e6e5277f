// Wide queries: fp32 cannot hold their scores or sums of values, or cannot tell them apart, so fp64 does. The main
// kernels mark them by a log-sum-exp that is large, infinite or NaN, which inputs of NaN also cause. The host does not
// know whether there are any, so these kernels are always launched, and end at once if there are none.
//
// Slow: a warp computes one row after another. Functions of fp64 fix every rounding, so that a score has the same bits
// wherever it is computed.
#include "expert_attention/expert_attention_cuda.h"

namespace {

constexpr int warps = 8, threads = 32 * warps, rows_per_block = 64;
constexpr float largest_lse = 4096;  // powers of 2; rounded to fp32, it makes weights wrong by 1.7e-4

struct Tokens {
  const void* x;
  int64_t stride_pair, stride_token;
};

struct Wide {
  mk::AttentionWork work;
  Tokens q, k, v;
  const float *cos, *sin;
  const float* lse;
};

__device__ bool is_wide(float lse) { return !(fabsf(lse) <= largest_lse); }

// The channels of a lane: pairs of neighbours, `n` in all.
template <class T, int n>
struct Row {
  double x[n];
  __device__ Row(const Tokens& t, int64_t pair, int64_t token, int head) {
    const T* const from = static_cast<const T*>(t.x) + pair * t.stride_pair + token * t.stride_token +
                          (int64_t)head * 32 * n + threadIdx.x % 32 * n;
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = mk::to_float(from[i]);
  }
  __device__ void turn(const Wide& p, int64_t token) {
    const int64_t at = token * 32 * n + threadIdx.x % 32 * n;
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const double a = x[i], b = x[i + 1];
      x[i] = fma(a, (double)p.cos[at + i], -(b * p.sin[at + i]));
      x[i + 1] = fma(b, (double)p.cos[at + i + 1], a * p.sin[at + i + 1]);
    }
  }
  __device__ void scale(double factor) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] *= factor;
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

// The weights of a row so far: the largest score, and the sum of the exponentials relative to it.
struct Softmax {
  double top = -INFINITY, sum = 0;
  // One more key: its weight, and what older terms are multiplied by.
  __device__ void add(double score, double& weight, double& shrink) {
    const double now = fmax(top, score);
    const double finite = isnan(score) ? score : now;  // fmax takes the other one for NaN
    shrink = exp(top - finite), weight = exp(score - finite);
    sum = sum * shrink + weight;
    top = finite;
  }
};

template <class T>
__device__ T rounded(double x) {
  return mk::from_float<T>((float)x);
}

// Where a block is: its pair, head and first row.
struct Place {
  int64_t pair, first;
  int head;
  __device__ Place(const mk::AttentionWork& work) {
    const auto item = work.item(blockIdx.x);
    pair = item.pair, head = item.head, first = (int64_t)item.tile * rows_per_block;
  }
  __device__ int64_t lse(const mk::AttentionWork& work) const { return (pair * work.heads + head) * work.length; }
};

// Rewrites the results of wide queries; zeros for padding. `out` is contiguous.
template <class T, int width>
__global__ void __launch_bounds__(threads) wide_forward(const __grid_constant__ Wide p, T* out, float* lse) {
  constexpr int n = width / 32;
  const Place place(p.work);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool padding = place.pair >= p.work.valid_pairs();
  const double root = 1 / sqrt((double)width);
  for (int64_t row = place.first + warp; row < place.first + rows_per_block && row < p.work.length; row += warps) {
    T* const to = out + ((place.pair * p.work.length + row) * p.work.heads + place.head) * width + lane * n;
    if (padding) {
#pragma unroll
      for (int i = 0; i < n; ++i) to[i] = rounded<T>(0);
      if (lane == 0) lse[place.lse(p.work) + row] = 0;
    } else if (is_wide(lse[place.lse(p.work) + row])) {
      Row<T, n> q(p.q, place.pair, row, place.head);
      q.turn(p, row);
      q.scale(root);
      Softmax softmax;
      double sum[n] = {};
      for (int64_t key = 0; key < p.work.length; ++key) {
        Row<T, n> k(p.k, place.pair, key, place.head);
        const Row<T, n> v(p.v, place.pair, key, place.head);
        k.turn(p, key);
        double weight, shrink;
        softmax.add(q.dot(k), weight, shrink);
#pragma unroll
        for (int i = 0; i < n; ++i) sum[i] = sum[i] * shrink + weight * v.x[i];
      }
#pragma unroll
      for (int i = 0; i < n; ++i) to[i] = rounded<T>(sum[i] / softmax.sum);
    }
  }
}

template <class T>
cudaError_t launch_forward(const Wide& p, const mk_expert_attention_cuda_fwd_args& a) {
  auto* const kernel = a.D == 64 ? wide_forward<T, 64> : wide_forward<T, 128>;
  const int blocks = p.work.pairs * p.work.heads * p.work.tiles;
  kernel<<<blocks, threads, 0, (cudaStream_t)a.stream>>>(p, (T*)a.out, (float*)a.lse);
  return cudaGetLastError();
}

template <class Args>
Wide wide(const Args& a) {
  const int32_t tiles = (int32_t)((a.L + rows_per_block - 1) / rows_per_block);
  return {{(const int64_t*)a.num_valid, (int32_t)a.P, (int32_t)a.H, (int32_t)a.L, tiles},
          {(const void*)a.q, a.q_stride_pair, a.q_stride_token},
          {(const void*)a.k, a.k_stride_pair, a.k_stride_token},
          {(const void*)a.v, a.v_stride_pair, a.v_stride_token},
          (const float*)a.cos,
          (const float*)a.sin,
          (const float*)a.lse};
}

}  // namespace

cudaError_t mk::launch_wide_forward(const mk_expert_attention_cuda_fwd_args& a) {
  return a.dtype == MK_BF16 ? launch_forward<__nv_bfloat16>(wide(a), a) : launch_forward<__half>(wide(a), a);
}
