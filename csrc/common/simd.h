// Vectors as wide as the translation unit may use them, for files that are compiled once per instruction set.
// Everything is in an anonymous namespace, and such files use no STL: of a weak symbol that several objects define the
// linker keeps one, which could be the AVX-512 copy.
#pragma once

#include <stdint.h>
#include <string.h>

// Keeps a small array in registers: it stands before a loop over the array with a constant trip count.
#if defined(__clang__)
#define MK_UNROLL _Pragma("unroll")
#else
#define MK_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

constexpr int lanes = vector_bytes / 4;
typedef float vfloat __attribute__((vector_size(vector_bytes)));
typedef uint32_t vuint __attribute__((vector_size(vector_bytes)));

// The sum of all lanes of all vectors.
template <int n>
inline float total(const vfloat (&v)[n]) {
  vfloat all = v[0];
  MK_UNROLL for (int i = 1; i < n; ++i) all += v[i];
  typedef float four __attribute__((vector_size(16)));
  four quarter[lanes / 4];
  memcpy(quarter, &all, sizeof quarter);
  MK_UNROLL for (int i = 1; i < lanes / 4; ++i) quarter[0] += quarter[i];
  return (quarter[0][0] + quarter[0][1]) + (quarter[0][2] + quarter[0][3]);
}

// 2^x to 0.7 units in the last place; 0 below 2^-126.5, infinity from 2^127.5 on, NaN for NaN.
inline vfloat exp2(vfloat x) {
  // Adding and subtracting 1.5 * 2^23 rounds to an integer, which stays behind in the low bits.
  const vfloat shift = vfloat{} + 12582912.0f;
  const vfloat largest = vfloat{} + 128.0f, smallest = vfloat{} - 127.0f;
  x = x < smallest ? smallest : x;
  x = x > largest ? largest : x;
  const vfloat shifted = x + shift, r = x - (shifted - shift);
  vfloat y = vfloat{} + 0.000153458124f;  // minimax in relative error on [-1/2, 1/2]
  y = y * r + 0.00133999309f;
  y = y * r + 0.00961848907f;
  y = y * r + 0.0555032864f;
  y = y * r + 0.240226462f;
  y = y * r + 0.693147182f;
  y = y * r + 1.0f;
  // The exponent field of 2^n is n + 127: 0 for n = -127, infinity for n = 128.
  return y * (vfloat)(((vuint)shifted << 23) + 0x3f800000u);
}

// A format moves one vector register of `count` <= `width` neighbouring elements between memory and `parts` fp32
// vectors. A `count` known to be `width` compiles to a single load or store.
struct F32 {
  typedef float type;
  static constexpr int parts = 1, width = lanes;

  static inline void load(const float* p, int count, vfloat v[parts]) {
    v[0] = vfloat{};
    memcpy(&v[0], p, count * sizeof *p);
  }
  static inline void store(float* p, int count, const vfloat v[parts]) { memcpy(p, &v[0], count * sizeof *p); }
};

// A 32-bit lane holds two bf16, the even element in its low half. Each is the upper half of an fp32, so a shift and a
// mask widen them with no shuffle. Little-endian only.
struct BF16 {
  typedef uint16_t type;
  static constexpr int parts = 2, width = 2 * lanes;

  static inline void load(const uint16_t* p, int count, vfloat v[parts]) {
    vuint pairs = {};
    memcpy(&pairs, p, count * sizeof *p);
    v[0] = (vfloat)(pairs << 16);
    v[1] = (vfloat)(pairs & 0xffff0000u);
  }

  static inline void store(uint16_t* p, int count, const vfloat v[parts]) {
    const vuint pairs = (round(v[0]) >> 16) | (round(v[1]) & 0xffff0000u);
    memcpy(p, &pairs, count * sizeof *p);
  }

  // To nearest, ties to even, in the upper half of each lane. The carry could turn a NaN into an infinity.
  static inline vuint round(vfloat v) {
    const vuint bits = (vuint)v;
    return v != v ? vuint{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
};

}  // namespace
