// Numbers as a GPU has them: formats, rounding, and what becomes of NaN and of denormal numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

inline float as_float(uint32_t x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  return x;
}
constexpr uint32_t NAN_BITS = 0x7fffffffu;  // the NaN that a GPU's instructions give
inline bool is_nan(float f) { return f != f; }

struct BF16 {
  static float widen(uint32_t x) { return as_float(x << 16); }
  static uint16_t narrow(float f) {
    uint32_t x = as_bits(f);
    return (x & 0x7fffffff) > 0x7f800000 ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
  }
  static constexpr uint16_t infinity = 0x7f80;
};
struct F16 {
  static float widen(uint32_t x) {
    uint16_t bits = x;
    _Float16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
  }
  static uint16_t narrow(float f) {
    _Float16 h = (_Float16)f;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return is_nan(f) ? 0x7fff : bits;
  }
  static constexpr uint16_t infinity = 0x7c00;
};
struct TF32 {
  static float widen(uint32_t x) { return as_float(x & 0xffffe000u); }  // matrix units ignore the other bits
};

inline float flushed(float f) { return as_bits(f) & 0x7f800000 ? f : as_float(as_bits(f) & 0x80000000u); }

// A number beats NaN, and -0 is below +0.
template <class T>
T least(T a, T b) {
  if (a != a) return b != b ? T(as_float(NAN_BITS)) : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T greatest(T a, T b) {
  if (a != a) return b != b ? T(as_float(NAN_BITS)) : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// The sum rounded to odd: what is inexact gets an odd last bit, so that rounding it once more, to a format with two
// bits less or fewer, is as rounding the exact sum.
inline float sum_to_odd(double a, double b) {
  double sum = a + b;
  if (!(std::fabs(sum) < INFINITY)) return (float)sum;
  const double part = sum - a, error = (a - (sum - part)) + (b - part);
  auto step = [](auto x, bool up) {
    return up ? std::nextafter(x, decltype(x)(INFINITY)) : std::nextafter(x, -decltype(x)(INFINITY));
  };
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  if (error != 0 && !(bits & 1)) sum = step(sum, error > 0);
  float narrow = (float)sum;
  if ((double)narrow != sum && !(as_bits(narrow) & 1)) narrow = step(narrow, sum > (double)narrow);
  return narrow;
}

// 2^x to about 1e-12 before it is rounded: a GPU's ex2.approx is off by up to 2^-22.
inline float exp2_of(float x) {
  static constexpr double c[] = {1.0,
                                 6.931471805599453e-1,
                                 2.402265069591007e-1,
                                 5.550410866482158e-2,
                                 9.618129107628477e-3,
                                 1.3333558146428443e-3,
                                 1.540353039338161e-4,
                                 1.525273380405984e-5,
                                 1.3215486790144307e-6,
                                 1.0178086009239699e-7,
                                 7.054911620801123e-9,
                                 4.4455382718708e-10};
  double wide = x < -200 ? -200 : x > 200 ? 200 : (double)x;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  double n = (wide + magic) - magic, f = wide - n, p = c[11];
  for (int k = 10; k >= 0; --k) p = p * f + c[k];
  int64_t exponent = ((int64_t)(int32_t)n + 1023) << 52;
  double power;
  memcpy(&power, &exponent, 8);
  float result = (float)(p * power);
  return is_nan(x) ? as_float(NAN_BITS) : result;
}

}  // namespace emulator
