// Products of matrices by the four warps of a group on sm_90a: wgmma, asynchronous, 16 steps of depth per instruction.
//
// D is 64 x N in fp32, in registers: thread t of the group holds, in d[4 j + 2 r + c], row 16 (t / 32) + t % 32 / 4 + 8
// r and column 8 j + 2 (t % 4) + c. A is 64 x 16, from shared memory or from registers; B is 16 x N, from shared
// memory. A tile in shared memory has rows of 128 bytes as SWIZZLE_128B of a tensor map writes them; hopper.h makes its
// descriptor. B has its depth along a row, or, where `transposed`, its columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace mk::hopper {

// Operand 0 and the next ones, as PTX writes them. C++ cannot count in a text.
#define MK_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MK_REGISTERS_32 \
  MK_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MK_REGISTERS_64                                                              \
  MK_REGISTERS_32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_REGISTERS_128                                                                         \
  MK_REGISTERS_64                                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MK_8(d, i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MK_32(d, i) MK_8(d, i), MK_8(d, i + 8), MK_8(d, i + 16), MK_8(d, i + 24)
#define MK_ALL_16(d) MK_8(d, 0), MK_8(d, 8)
#define MK_ALL_32(d) MK_32(d, 0)
#define MK_ALL_64(d) MK_32(d, 0), MK_32(d, 32)
#define MK_ALL_128(d) MK_32(d, 0), MK_32(d, 32), MK_32(d, 64), MK_32(d, 96)

// The arguments behind `count`, the registers of D, are the operands that follow them.
#define MK_ASM(n, type, count, a_text, b_text, add_text, flags, ...)                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_text                                              \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" MK_REGISTERS_##count \
               "}, " a_text ", " b_text ", p, 1, 1, " flags ";\n}\n"                                     \
               : MK_ALL_##count(d)                                                                       \
               : __VA_ARGS__)
#define MK_WGMMA(n, count, x0, x1, x2, x3, x4, x5, x6)                                                          \
  /* d = a b, or d += a b. */                                                                                   \
  template <class T, bool transposed = false>                                                                   \
  __device__ void multiply(float (&d)[count], uint64_t a, uint64_t b, int add) {                                \
    if constexpr (std::is_same_v<T, __half>)                                                                    \
      MK_ASM(n, "f16", count, x0, x1, x2, "0, " x3, "l"(a), "l"(b), "r"(add), "n"((int)transposed));            \
    else                                                                                                        \
      MK_ASM(n, "bf16", count, x0, x1, x2, "0, " x3, "l"(a), "l"(b), "r"(add), "n"((int)transposed));           \
  }                                                                                                             \
  template <class T, bool transposed = false>                                                                   \
  __device__ void multiply(float (&d)[count], const uint32_t (&a)[4], uint64_t b, int add) {                    \
    if constexpr (std::is_same_v<T, __half>)                                                                    \
      MK_ASM(n, "f16", count, "{" x0 ", " x1 ", " x2 ", " x3 "}", x4, x5, x6, "r"(a[0]), "r"(a[1]), "r"(a[2]),  \
             "r"(a[3]), "l"(b), "r"(add), "n"((int)transposed));                                                \
    else                                                                                                        \
      MK_ASM(n, "bf16", count, "{" x0 ", " x1 ", " x2 ", " x3 "}", x4, x5, x6, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
             "r"(a[3]), "l"(b), "r"(add), "n"((int)transposed));                                                \
  }
MK_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
MK_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
MK_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
MK_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#undef MK_WGMMA
#undef MK_ASM
#undef MK_ALL_128
#undef MK_ALL_64
#undef MK_ALL_32
#undef MK_ALL_16
#undef MK_32
#undef MK_8
#undef MK_REGISTERS_128
#undef MK_REGISTERS_64
#undef MK_REGISTERS_32
#undef MK_REGISTERS_16

}  // namespace mk::hopper
