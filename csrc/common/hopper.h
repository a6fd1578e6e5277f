// What sm_90a has and CUDA C++ has no words for: mbarriers, the tensor memory accelerator (TMA), groups of four warps.
// Each function is one instruction, or one idea, and its comment gives the rule that the instruction obeys.
//
// Shared memory is addressed by 32-bit numbers, since TMA and the descriptors of matrices want them.
#pragma once

#include <cuda.h>

#include "common/wgmma.h"

namespace mk::hopper {

constexpr int group_threads = 128;
constexpr int row_bytes = 128;    // of a tile in shared memory: 64 channels of 2 bytes
constexpr int tile_align = 1024;  // the swizzle repeats after 8 rows

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Where the first tile may begin.
__device__ inline uint32_t aligned_shared_address(const void* p) {
  return (shared_address(p) + tile_align - 1) & ~(uint32_t)(tile_align - 1);
}
// The same number for all threads of a warp; the compiler knows it then.
__device__ inline int group_index() { return __shfl_sync(~0u, threadIdx.x / group_threads, 0); }

// ---- mbarriers: phases that end when all arrivals and all expected bytes are there. A waiter that is two phases
// behind
// ---- takes the wrong phase for its own, since only the parity is known.

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// By the thread that initialised the barriers, before a barrier of the block: TMA sees them then.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is over. Of a fresh barrier, the phase with parity 1 counts as over.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nTRY:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra END;\nbra TRY;\nEND:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Places that are filled and emptied in turn. `phase` is the parity of the rounds.
template <int n>
struct Ring {
  int at = 0;
  uint32_t phase = 0;
  __device__ void step() {
    if (++at == n) at = 0, phase ^= 1;
  }
};

// ---- TMA: copies of boxes of tensors, issued by one thread. What lies outside of the tensor is read as zeros and not
// ---- written.

// The box at (c0, c1, c2) into shared memory; its bytes count for the barrier.
__device__ inline void load_box(uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// The box from shared memory. All who wrote it call fence_async_proxy() and pass a barrier before.
__device__ inline void store_box(const CUtensorMap* map, uint32_t from, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from),
               "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The stores of this thread since the last commit become one group.
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the latest `pending` groups have read their shared memory, which may be written then.
template <int pending = 0>
__device__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// Until all stores are done: before the block ends.
__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- Groups of four warps

// All warps of a group: what the producer gives up, the consumers take.
template <int n>
__device__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n>
__device__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}
// Of the threads that call it with this id, from 1 on; 0 is __syncthreads().
template <int threads>
__device__ void named_barrier(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

// ---- Around products (wgmma.h)

// Before the first product, and wherever registers of a product were written since the last one.
__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the latest `pending` groups are done.
template <int pending = 0>
__device__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Keeps the compiler from moving uses of the registers of a product in flight over this point.
template <int n>
__device__ void pin(float (&r)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <class T, int m, int n>
__device__ void pin(T (&r)[m][n]) {
#pragma unroll
  for (int i = 0; i < m; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      pin(r[i]);
    } else {
#pragma unroll
      for (int j = 0; j < n; ++j) asm volatile("" : "+r"(r[i][j])::"memory");
    }
  }
}

// The lower half of the descriptor of a tile: bits 0 to 13 are its address / 16, bits 16 to 29 the distance of atoms
// along the row (not used: there is one). A step of 16 in depth adds 2 where the depth lies along the row, else 128.
__device__ inline uint32_t descriptor(uint32_t tile) { return (tile >> 4) + (1u << 16); }
// The whole descriptor. Its upper half is the same for all tiles: 8 rows take 1024 bytes; bit 62 is the swizzle.
__device__ inline uint64_t whole(uint32_t low) { return (uint64_t)((1024 >> 4) | 1u << 30) << 32 | low; }

// The address of 16-byte chunk `chunk` of row `row` of a tile.
__device__ inline uint32_t chunk_address(uint32_t tile, int row, int chunk) {
  return tile + row * row_bytes + ((chunk ^ row % 8) << 4);
}

// Two numbers rounded to T, `low` in the lower half.
template <class T>
__device__ uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (std::is_same_v<T, __half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// The 16 x 16 operand A of this warp's product from rows `row` and columns 16 k on.
__device__ inline void load_operand(uint32_t (&a)[4], uint32_t tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(chunk_address(tile, row + lane % 16, 2 * k + lane / 16))
               : "memory");
}

__device__ inline float4 load_shared(uint32_t address) {
  float4 y;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w)
               : "r"(address)
               : "memory");
  return y;
}

// A group's 64 x 64 results, d as wgmma.h says, into a tile.
template <class T>
__device__ void store_tile(uint32_t tile, const float (&d)[32]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // 16 columns: matrices of rows 0-7 and 8-15, columns 0-7 and 8-15
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = pack<T>(d[8 * j + 2 * i], d[8 * j + 2 * i + 1]);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     chunk_address(tile, row, 2 * j + lane / 16)),
                 "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3])
                 : "memory");
  }
}

// 2^x; the error is 2 ulp, and subnormal results are zeros.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mk::hopper
