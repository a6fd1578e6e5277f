#include "expert_attention/expert_attention_cuda.h"

namespace {

constexpr int threads = 256;
constexpr int n = 8;  // channels of a thread, 16 bytes

// The numbers that two threads of a group have in common, added up; a group is `lanes` neighbours in a warp.
template <int lanes>
__device__ float sum_of_group(float x) {
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

struct Tokens {
  const void* x;
  void* turned;
  int64_t stride_pair, stride_token;
  float scale;
};

struct Prepare {
  Tokens tensors[2];  // queries and keys
  const float *cos, *sin;
  mk::AttentionWork work;  // its tiles are not used
  int32_t* retry;
  int32_t retry_size;
};

// turned = scale rope(x), with NaN for tokens whose scores may overflow in fp32; clears the list of retries. Nothing is
// written for padding.
template <class T, int width>
__global__ void __launch_bounds__(threads) prepare(const __grid_constant__ Prepare p) {
  constexpr int lanes = width / n;
  const Tokens& t = p.tensors[blockIdx.y];
  const int64_t thread = (int64_t)blockIdx.x * threads + threadIdx.x, place = thread / lanes;  // (pair, token, head)
  if (blockIdx.y == 0 && p.retry && thread < p.retry_size) p.retry[thread] = 0;
  const int head = (int)(place % p.work.heads), channel = (int)(thread % lanes) * n;
  const int64_t token = place / p.work.heads % p.work.length, pair = place / p.work.heads / p.work.length;
  const bool valid = pair < p.work.valid_pairs();

  mk::Pack<T, n> x{};
  float y[n] = {}, squares = 0;
  if (valid) {
    x = mk::load<T, n>(static_cast<const T*>(t.x) + pair * t.stride_pair + token * t.stride_token + head * width +
                       channel);
    const auto cos = mk::load<float, n>(p.cos + token * width + channel);
    const auto sin = mk::load<float, n>(p.sin + token * width + channel);
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const float a = mk::to_float(x.element[i]), b = mk::to_float(x.element[i + 1]);
      y[i] = a * cos.element[i] - b * sin.element[i];
      y[i + 1] = b * cos.element[i + 1] + a * sin.element[i + 1];
      squares += y[i] * y[i] + y[i + 1] * y[i + 1];
    }
  }
  // The product of two tokens that are shorter than 2^63 has room in fp32.
  const bool scorable = sum_of_group<lanes>(squares) < 0x1p126f;
#pragma unroll
  for (int i = 0; i < n; ++i) x.element[i] = mk::from_float<T>(scorable ? y[i] * t.scale : NAN);
  if (valid) mk::store(static_cast<T*>(t.turned) + place * width + channel, x);
}

template <class T>
cudaError_t launch_prepare(const Prepare& p, int64_t width, cudaStream_t stream) {
  const int64_t all = (int64_t)p.work.pairs * p.work.length * p.work.heads * width / n;
  const dim3 grid((unsigned)((all + threads - 1) / threads), 2);
  auto* const kernel = width == 64 ? prepare<T, 64> : prepare<T, 128>;
  kernel<<<grid, threads, 0, stream>>>(p);
  return cudaGetLastError();
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
  if (int status = mk::check_limits(
          function,
          {{"P", a.P}, {"L", a.L}, {"H", a.H, 1}, {"D", a.D, 64, 128}, {"dtype", a.dtype, MK_BF16, MK_F16}})) {
    return status;
  }
  if (a.D % 64) return mk::fail(MK_BAD_ARG, "%s: D must be 64 or 128, got %lld", function, (long long)a.D);
  if (a.P && a.L && a.H > MK_CUDA_MAX_SCORED / a.P / a.L) {
    return mk::fail(MK_BAD_ARG, "%s: P * H * L must be at most %d", function, (int)MK_CUDA_MAX_SCORED);
  }
  return MK_OK;
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
  const cudaStream_t stream = (cudaStream_t)a.stream;
  const Prepare p{
      {{(const void*)a.q, (void*)a.turned_q, a.q_stride_pair, a.q_stride_token, mk::query_scale(a.dtype, a.D)},
       {(const void*)a.k, (void*)a.turned_k, a.k_stride_pair, a.k_stride_token, 1}},
      (const float*)a.cos,
      (const float*)a.sin,
      {(const int64_t*)a.num_valid, (int32_t)a.P, (int32_t)a.H, (int32_t)a.L, 0},
      (int32_t*)a.retry,
      (int32_t)(1 + 2 * a.P * a.H * ((a.L + 63) / 64))};
  cudaError_t error =
      a.dtype == MK_BF16 ? launch_prepare<__nv_bfloat16>(p, a.D, stream) : launch_prepare<__half>(p, a.D, stream);
  if (!error) error = mk::launch_forward_sm90a(a);
  if (!error) error = mk::launch_wide_forward(a);
  return mk::cuda_status(function, error);
}

}  // namespace

MK_DEFINE(mk_expert_attention_cuda_fwd, forward)
