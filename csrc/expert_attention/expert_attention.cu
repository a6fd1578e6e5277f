#include "expert_attention/expert_attention_cuda.h"

namespace {

constexpr int threads = 256;
constexpr int n = 8;  // channels of a thread, 16 bytes

// The sum over a group of threads: `lanes` neighbours in a warp.
template <int lanes>
__device__ float sum_of_group(float x) {
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Threads are numbered along channels, then heads, then rows, then pairs.
template <int width>
struct Place {
  int head, channel;  // of the head, the first of the thread's
  int64_t row, pair;
  __device__ Place(int64_t thread, int heads, int rows) {
    constexpr int lanes = width / n;
    channel = (int)(thread % lanes) * n;
    head = (int)(thread / lanes % heads);
    row = thread / lanes / heads % rows, pair = thread / lanes / heads / rows;
  }
  __device__ int64_t offset(int64_t stride_pair, int64_t stride_row) const {
    return pair * stride_pair + row * stride_row + head * width + channel;
  }
};

__device__ int64_t thread_of_grid() { return (int64_t)blockIdx.x * threads + threadIdx.x; }
unsigned blocks_for(const mk::AttentionWork& work, int64_t rows, int64_t width) {
  return (unsigned)((work.pairs * rows * work.heads * (width / n) + threads - 1) / threads);
}

struct Tokens {
  const void* x;
  int64_t stride_pair, stride_token;
  void* turned;  // contiguous
  float scale;
};

struct Turn {
  Tokens tensors[2];  // queries and keys
  const float *cos, *sin;
  mk::AttentionWork work;  // its tiles are not used
  int32_t* flags;          // zeros from now on
  int32_t num_flags;
};

// turned = scale rope(x), with NaN for tokens whose scores may overflow in fp32. Nothing is written for padding.
template <class T, int width>
__global__ void __launch_bounds__(threads) turn(const __grid_constant__ Turn p) {
  const Tokens& t = p.tensors[blockIdx.y];
  const Place<width> place(thread_of_grid(), p.work.heads, p.work.length);
  if (blockIdx.y == 0 && thread_of_grid() < p.num_flags) p.flags[thread_of_grid()] = 0;
  const bool valid = place.pair < p.work.valid_pairs();
  mk::Pack<T, n> x{};
  float y[n] = {}, squares = 0;
  if (valid) {
    x = mk::load<T, n>(static_cast<const T*>(t.x) + place.offset(t.stride_pair, t.stride_token));
    const int64_t at = place.row * width + place.channel;
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      const auto cos = mk::load<float, 4>(p.cos + at + i), sin = mk::load<float, 4>(p.sin + at + i);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float a = mk::to_float(x.element[i + j]), b = mk::to_float(x.element[i + j + 1]);
        y[i + j] = a * cos.element[j] - b * sin.element[j];
        y[i + j + 1] = b * cos.element[j + 1] + a * sin.element[j + 1];
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) squares += y[i] * y[i];
  }
  // The product of two tokens that are shorter than 2^63 has room in fp32.
  const bool scorable = sum_of_group<width / n>(squares) < 0x1p126f;
  if (!valid) return;
#pragma unroll
  for (int i = 0; i < n; ++i) x.element[i] = mk::from_float<T>(scorable ? y[i] * t.scale : NAN);
  const int64_t channels = p.work.heads * width;
  mk::store(static_cast<T*>(t.turned) + place.offset(p.work.length * channels, channels), x);
}

struct RowSums {
  const void *grad, *out;
  int64_t grad_stride_pair, grad_stride_token;  // `out` is contiguous
  const float* lse;
  float2* sums;         // (P, H, rows)
  int32_t* wide_heads;  // (P, H)
  mk::AttentionWork work;
  int32_t rows;
};

// Of each query: -lse, and delta, the sum over channels of grad * out. Behind the last query -infinity makes weights
// zero. Heads with wide queries are flagged. Nothing is written for padding.
template <class T, int width>
__global__ void __launch_bounds__(threads) row_sums(const __grid_constant__ RowSums p) {
  const Place<width> place(thread_of_grid(), p.work.heads, p.rows);
  const bool valid = place.pair < p.work.valid_pairs(), is_query = place.row < p.work.length;
  float delta = 0;
  if (valid && is_query) {
    const int64_t channels = p.work.heads * width;
    const auto out = mk::load<T, n>(static_cast<const T*>(p.out) + place.offset(p.work.length * channels, channels));
    const auto grad =
        mk::load<T, n>(static_cast<const T*>(p.grad) + place.offset(p.grad_stride_pair, p.grad_stride_token));
#pragma unroll
    for (int i = 0; i < n; ++i) delta = fmaf(mk::to_float(out.element[i]), mk::to_float(grad.element[i]), delta);
  }
  delta = sum_of_group<width / n>(delta);
  if (valid && place.channel == 0) {
    const int64_t head = place.pair * p.work.heads + place.head;
    const float lse = is_query ? p.lse[head * p.work.length + place.row] : INFINITY;
    if (is_query && mk::is_wide(lse)) atomicExch(p.wide_heads + head, 1);
    p.sums[head * p.rows + place.row] = {-lse, delta};
  }
}

struct Operand {
  const char* name;
  uint64_t address;
  int64_t stride_pair, stride_token;
};

template <int count>
int check_alignment(const char* function, const Operand (&operands)[count]) {
  for (const Operand& o : operands) {
    if (o.address % 16 || o.stride_pair % 8 || o.stride_token % 8) {
      return mk::fail(MK_BAD_ARG,
                      "%s: %s must begin at a multiple of 16 bytes and have strides that are multiples of 8", function,
                      o.name);
    }
  }
  return MK_OK;
}

template <class Args>
int check_sizes(const char* function, const Args& a) {
  if (int status =
          mk::check_limits(function, {{"P", a.P}, {"L", a.L}, {"H", a.H, 1}, {"dtype", a.dtype, MK_BF16, MK_F16}})) {
    return status;
  }
  if (a.D != 64 && a.D != 128)
    return mk::fail(MK_BAD_ARG, "%s: D must be 64 or 128, got %lld", function, (long long)a.D);
  if (a.P && a.L && a.H > MK_CUDA_MAX_QUERIES / a.P / a.L) {
    return mk::fail(MK_BAD_ARG, "%s: P * H * L must be at most %d", function, (int)MK_CUDA_MAX_QUERIES);
  }
  return MK_OK;
}

template <class Args>
mk::AttentionWork work_of(const Args& a) {
  return {(const int64_t*)a.num_valid, (int32_t)a.P, (int32_t)a.H, (int32_t)a.L, 0};
}

template <class Args>
cudaError_t launch_turn(const Args& a, uint64_t flags, int64_t num_flags) {
  const float scale = mk::query_scale(a.dtype, a.D);
  const Turn p{{{(const void*)a.q, a.q_stride_pair, a.q_stride_token, (void*)a.turned_q, scale},
                {(const void*)a.k, a.k_stride_pair, a.k_stride_token, (void*)a.turned_k, 1}},
               (const float*)a.cos,
               (const float*)a.sin,
               work_of(a),
               (int32_t*)flags,
               (int32_t)num_flags};
  auto* const kernel = a.dtype == MK_BF16 ? a.D == 64 ? turn<__nv_bfloat16, 64> : turn<__nv_bfloat16, 128>
                       : a.D == 64        ? turn<__half, 64>
                                          : turn<__half, 128>;
  const dim3 grid(blocks_for(p.work, a.L, a.D), 2);
  kernel<<<grid, threads, 0, (cudaStream_t)a.stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_row_sums(const mk_expert_attention_cuda_bwd_args& a) {
  const RowSums p{(const void*)a.grad,    (const void*)a.out,  a.grad_stride_pair,
                  a.grad_stride_token,    (const float*)a.lse, (float2*)a.row_sums,
                  (int32_t*)a.wide_heads, work_of(a),          (int32_t)((a.L + 63) / 64 * 64)};
  auto* const kernel = a.dtype == MK_BF16 ? a.D == 64 ? row_sums<__nv_bfloat16, 64> : row_sums<__nv_bfloat16, 128>
                       : a.D == 64        ? row_sums<__half, 64>
                                          : row_sums<__half, 128>;
  kernel<<<blocks_for(p.work, p.rows, a.D), threads, 0, (cudaStream_t)a.stream>>>(p);
  return cudaGetLastError();
}

int forward(const char* function, const mk_expert_attention_cuda_fwd_args& a) {
  if (int status = check_sizes(function, a)) return status;
  if (int status = mk::check_limits(function, {{"range", a.range, MK_RANGE_NONE, MK_RANGE_POLYNOMIAL}})) return status;
  if (a.dtype == MK_F16 && a.range != MK_RANGE_ONLINE) {
    return mk::fail(MK_BAD_ARG, "%s: range must be MK_RANGE_ONLINE in fp16, got %lld", function, (long long)a.range);
  }
  if (int status = check_alignment(function, {{"q", a.q, a.q_stride_pair, a.q_stride_token},
                                              {"k", a.k, a.k_stride_pair, a.k_stride_token},
                                              {"v", a.v, a.v_stride_pair, a.v_stride_token}})) {
    return status;
  }
  if (a.P == 0 || a.L == 0) return MK_OK;
  const mk::DeviceGuard guard(a.device);
  if (guard.error() != cudaSuccess) return mk::cuda_status(function, guard.error());
  cudaError_t error = mk::require_hopper(a.device);
  if (!error) error = launch_turn(a, a.retry, 1 + 2 * a.P * a.H * ((a.L + 63) / 64));
  if (!error) error = mk::launch_forward_sm90a(a);
  if (!error) error = mk::launch_wide_forward(a);
  return mk::cuda_status(function, error);
}

int backward(const char* function, const mk_expert_attention_cuda_bwd_args& a) {
  if (int status = check_sizes(function, a)) return status;
  if (int status = check_alignment(function, {{"grad", a.grad, a.grad_stride_pair, a.grad_stride_token},
                                              {"q", a.q, a.q_stride_pair, a.q_stride_token},
                                              {"k", a.k, a.k_stride_pair, a.k_stride_token},
                                              {"v", a.v, a.v_stride_pair, a.v_stride_token}})) {
    return status;
  }
  if (a.P == 0 || a.L == 0) return MK_OK;
  const mk::DeviceGuard guard(a.device);
  if (guard.error() != cudaSuccess) return mk::cuda_status(function, guard.error());
  cudaError_t error = mk::require_hopper(a.device);
  if (!error) error = launch_turn(a, a.wide_heads, a.P * a.H);
  if (!error) error = launch_row_sums(a);
  if (!error) error = mk::launch_grad_kv_sm90a(a);
  if (!error) error = mk::launch_grad_q_sm90a(a);
  if (!error) error = mk::launch_wide_backward(a);
  return mk::cuda_status(function, error);
}

}  // namespace

MK_DEFINE(mk_expert_attention_cuda_fwd, forward)
MK_DEFINE(mk_expert_attention_cuda_bwd, backward)
