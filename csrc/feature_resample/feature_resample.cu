#include "common/cuda.h"
#include "feature_resample/checks.h"
#include "feature_resample/feature_resample.h"
#include "feature_resample/taps.h"

namespace {

constexpr int warps_per_block = 8;
constexpr int threads = 32 * warps_per_block, blocks_per_sm = 4;  // leaves 64 registers to a thread: no spills

// A warp writes one token, lane by lane along its channels, so everything about taps is uniform in the warp and is
// computed once for all the rows and channels. Both directions gather: there are no atomics, results are reproducible.
struct Resample {
  const void* src;
  void* dst;
  const int64_t* rows;
  int64_t M, C, src_stride_row, src_stride_token, dst_stride_row, dst_stride_token;
  mk::ResampleAxis h, w;
};

template <class T, int n>
__device__ void accumulate(float (&sum)[n], float weight, const mk::Pack<T, n>& value) {
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] = fmaf(weight, mk::to_float(value.element[i]), sum[i]);
}

template <class T, int n>
__device__ void store(T* dst, const float (&sum)[n]) {
  mk::Pack<T, n> value;
#pragma unroll
  for (int i = 0; i < n; ++i) value.element[i] = mk::from_float<T>(sum[i]);
  mk::store(dst, value);
}

// -0 is the neutral element of a sum: a single tap of weight 1 returns -0 as -0.
template <int n>
__device__ void clear(float (&sum)[n], float neutral) {
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] = neutral;
}

template <class T, int n>
__global__ void __launch_bounds__(threads, blocks_per_sm) forward(Resample p) {
  const int32_t token = blockIdx.x * warps_per_block + threadIdx.y;
  if (token >= p.h.out * p.w.out) return;
  const int32_t y = token / p.w.out, x = token % p.w.out;
  const int32_t iy[2] = {p.h.tap0(y), p.h.tap1(y)}, ix[2] = {p.w.tap0(x), p.w.tap1(x)};
  const int taps_y = 1 + (iy[0] != iy[1]), taps_x = 1 + (ix[0] != ix[1]);
  int32_t tap[2][2];
  float weight[2][2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      tap[j][k] = iy[j] * p.w.in + ix[k];
      weight[j][k] = p.h.weight(y, iy[j]) * p.w.weight(x, ix[k]);
    }
  }
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    const int64_t row = p.rows ? p.rows[m] : m;
    T* dst = static_cast<T*>(p.dst) + m * p.dst_stride_row + token * p.dst_stride_token;
    for (int64_t c = threadIdx.x * n; c < p.C; c += 32 * n) {
      float sum[n];
      if (row < 0) {
        clear(sum, 0.0f);
      } else {
        const T* src = static_cast<const T*>(p.src) + row * p.src_stride_row + c;
        mk::Pack<T, n> value[2][2];  // all four loads first: they are in flight together
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            value[j][k] = mk::load<T, n>(src + tap[j][k] * p.src_stride_token);
          }
        }
        clear(sum, -0.0f);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            if (j < taps_y && k < taps_x) accumulate(sum, weight[j][k], value[j][k]);
          }
        }
      }
      store(dst + c, sum);
    }
  }
}

template <class T, int n>
__global__ void __launch_bounds__(threads, blocks_per_sm) backward(Resample p) {
  const int32_t token = blockIdx.x * warps_per_block + threadIdx.y;
  if (token >= p.h.in * p.w.in) return;
  const int32_t iy = token / p.w.in, ix = token % p.w.in;
  const int32_t y_begin = p.h.first_reader(iy), y_end = p.h.last_reader(iy);
  const int32_t x_begin = p.w.first_reader(ix), x_end = p.w.last_reader(ix);
  const bool unread = y_begin == y_end || x_begin == x_end;
  for (int64_t m = blockIdx.y; m < p.M; m += gridDim.y) {
    T* dst = static_cast<T*>(p.dst) + m * p.dst_stride_row + token * p.dst_stride_token;
    for (int64_t c = threadIdx.x * n; c < p.C; c += 32 * n) {
      const T* src = static_cast<const T*>(p.src) + m * p.src_stride_row + c;
      float sum[n];
      clear(sum, unread ? 0.0f : -0.0f);
      for (int32_t y = y_begin; y < y_end; ++y) {
        const float weight_y = p.h.weight(y, iy);
        for (int32_t x = x_begin; x < x_end; ++x) {
          const int64_t offset = ((int64_t)y * p.w.out + x) * p.src_stride_token;
          accumulate(sum, weight_y * p.w.weight(x, ix), mk::load<T, n>(src + offset));
        }
      }
      store(dst + c, sum);
    }
  }
}

template <class T>
cudaError_t launch(const Resample& p, bool adjoint, cudaStream_t stream) {
  const int64_t tokens = adjoint ? (int64_t)p.h.in * p.w.in : (int64_t)p.h.out * p.w.out;
  const dim3 grid((unsigned)((tokens + warps_per_block - 1) / warps_per_block), (unsigned)(p.M < 65535 ? p.M : 65535));
  const dim3 block(32, warps_per_block);
  // n is a power of two, so numbers are all multiples of it exactly when their bitwise or is.
  constexpr int n = 16 / sizeof(T);
  const int64_t elements = p.C | p.src_stride_row | p.src_stride_token | p.dst_stride_row | p.dst_stride_token;
  const bool aligned = elements % n == 0 && ((uintptr_t)p.src | (uintptr_t)p.dst) % 16 == 0;
  auto* const kernel =
      adjoint ? (aligned ? backward<T, n> : backward<T, 1>) : (aligned ? forward<T, n> : forward<T, 1>);
  kernel<<<grid, block, 0, stream>>>(p);
  return cudaGetLastError();
}

template <bool adjoint>
int resample(const char* function, const mk_feature_resample_cuda_args& args) {
  const mk_feature_resample_args& a = args.op;
  if (int status = mk::check(function, a, adjoint)) return status;
  if (a.M == 0 || a.C == 0) return MK_OK;

  Resample p{(const void*)a.x,
             (void*)a.y,
             (const int64_t*)a.rows,
             a.M,
             a.C,
             a.x_stride_row,
             a.x_stride_token,
             a.y_stride_row,
             a.y_stride_token,
             {(int32_t)a.in_h, (int32_t)a.out_h},
             {(int32_t)a.in_w, (int32_t)a.out_w}};
  if (adjoint) {
    p.src = (const void*)a.y, p.src_stride_row = a.y_stride_row, p.src_stride_token = a.y_stride_token;
    p.dst = (void*)a.x, p.dst_stride_row = a.x_stride_row, p.dst_stride_token = a.x_stride_token;
  }
  const mk::DeviceGuard guard(args.device);
  if (guard.error() != cudaSuccess) return mk::cuda_status(function, guard.error());
  const cudaStream_t stream = (cudaStream_t)args.stream;
  switch (a.dtype) {
    case MK_F32:
      return mk::cuda_status(function, launch<float>(p, adjoint, stream));
    case MK_BF16:
      return mk::cuda_status(function, launch<__nv_bfloat16>(p, adjoint, stream));
    default:
      return mk::cuda_status(function, launch<__half>(p, adjoint, stream));
  }
}

}  // namespace

MK_DEFINE(mk_feature_resample_cuda_fwd, resample<false>)
MK_DEFINE(mk_feature_resample_cuda_bwd, resample<true>)
