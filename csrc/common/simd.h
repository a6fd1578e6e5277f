// Vectors as wide as the translation unit may use them, for files that are compiled once per instruction set.
// Everything is in an anonymous namespace, and such files use no STL: of a weak symbol that several objects define the
// linker keeps one, which could be the AVX-512 copy.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

// Keeps a small array in registers: it stands before a loop over the array with a constant trip count.
#if defined(__clang__)
#define MK_UNROLL _Pragma("unroll")
#else
#define MK_UNROLL _Pragma("GCC unroll 16")
#endif

// For functions and lambdas with a `count` of channels: inlined where `count` is constant, they do not call memcpy.
#define MK_INLINE inline __attribute__((always_inline))
#define MK_ALWAYS_INLINE __attribute__((always_inline))

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
typedef uint16_t vhalf __attribute__((vector_size(vector_bytes / 2)));

inline vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

// Lane i of the result is lane from[i] of a, or from[i] - lanes of b. `from` is known to the compiler.
inline vuint shuffle(vuint a, vuint b, vuint from) {
#if defined(__clang__)
  vuint r;
  MK_UNROLL for (int i = 0; i < lanes; ++i) r[i] = from[i] < lanes ? a[from[i]] : b[from[i] - lanes];
  return r;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

inline vuint lane_numbers() {
  alignas(64) constexpr uint32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vuint v;
  memcpy(&v, numbers, sizeof v);
  return v;
}

// Returns the sum of all lanes of all vectors.
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

constexpr float log2e = 1.44269504f;

// For exp2: split() reduces x to [-1/2, 1/2] and returns the integer part, in a form by which scale() multiplies
// with its power of 2. x may be infinite.
#if defined(__AVX512DQ__)
constexpr __mmask16 every = 0xffff;  // without a mask, GCC warns about its own headers
inline vfloat split(vfloat& x) {
  const __m512 whole = _mm512_maskz_roundscale_ps(every, (__m512)x, 0);
  x = (vfloat)_mm512_maskz_reduce_ps(every, (__m512)x, 0);
  return (vfloat)whole;
}
inline vfloat scale(vfloat y, vfloat whole) { return (vfloat)_mm512_maskz_scalef_ps(every, (__m512)y, (__m512)whole); }
#else
inline vfloat split(vfloat& x) {
  const vfloat largest = vfloat{} + 128.0f, smallest = vfloat{} - 127.0f;
  x = smallest > x ? smallest : x;
  x = largest < x ? largest : x;
  // Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold.
  const vfloat shift = vfloat{} + 12582912.0f, shifted = x + shift;
  x -= shifted - shift;
  return shifted;
}
// The exponent field of 2^n is n + 127: 0 for n = -127, infinity for n = 128.
inline vfloat scale(vfloat y, vfloat whole) { return y * (vfloat)(((vuint)whole << 23) + 0x3f800000u); }
#endif

// 2^x to 0.7 units in the last place, or coarsely to a relative error of 7.5e-5; at most denormal below 2^-126.5,
// infinity from 2^128 on at the latest, NaN for NaN. It takes several vectors at a time, step by step, since the steps
// of one vector wait for each other.
template <bool coarse = false, int n>
inline void exp2(vfloat (&x)[n]) {
  // Minimax in relative error on [-1/2, 1/2].
  constexpr float fine_polynomial[] = {
      0.000153458124f, 0.00133999309f, 0.00961848907f, 0.0555032864f, 0.240226462f, 0.693147182f, 1.0f};
  constexpr float coarse_polynomial[] = {0.0551716685f, 0.242611125f, 0.693260968f, 0.999928057f};
  constexpr int degree = coarse ? 3 : 6;
  const float* const polynomial = coarse ? coarse_polynomial : fine_polynomial;
  vfloat whole[n], y[n];
  MK_UNROLL for (int i = 0; i < n; ++i) whole[i] = split(x[i]);
  MK_UNROLL for (int i = 0; i < n; ++i) y[i] = vfloat{} + polynomial[0];
  MK_UNROLL for (int term = 1; term <= degree; ++term) {
    MK_UNROLL for (int i = 0; i < n; ++i) y[i] = y[i] * x[i] + polynomial[term];
  }
  MK_UNROLL for (int i = 0; i < n; ++i) x[i] = scale(y[i], whole[i]);
}

inline vfloat exp2(vfloat x) {
  vfloat one[1] = {x};
  exp2(one);
  return one[0];
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

// Rounds to nearest, ties to even; the result is the upper half of each lane. The carry could turn a NaN into an
// infinity.
inline vuint round_to_bf16(vfloat v) {
  const vuint bits = (vuint)v;
  return v != v ? vuint{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

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
    const vuint pairs = (round_to_bf16(v[0]) >> 16) | (round_to_bf16(v[1]) & 0xffff0000u);
    memcpy(p, &pairs, count * sizeof *p);
  }
};

// Keeps half a register of bf16 in the order of memory, at the cost of a shuffle: they meet fp32 operands lane by lane.
struct BF16InOrder {
  typedef uint16_t type;
  static constexpr int parts = 1, width = lanes;

  static inline void load(const uint16_t* p, int count, vfloat v[parts]) {
    vhalf half = {};
    memcpy(&half, p, count * sizeof *p);
    v[0] = (vfloat)(__builtin_convertvector(half, vuint) << 16);
  }

  static inline void store(uint16_t* p, int count, const vfloat v[parts]) {
    const vhalf half = __builtin_convertvector(round_to_bf16(v[0]) >> 16, vhalf);
    memcpy(p, &half, count * sizeof *p);
  }
};

// Moves `count` <= `lanes` elements of a format with one part.
template <class Format>
inline vfloat load(const typename Format::type* p, int count) {
  vfloat v[1];
  Format::load(p, count, v);
  return v[0];
}
template <class Format>
inline void store(typename Format::type* p, int count, vfloat v) {
  Format::store(p, count, &v);
}

}  // namespace
