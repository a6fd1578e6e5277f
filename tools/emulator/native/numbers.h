// Numbers as a GPU has them: formats, rounding, and what becomes of NaN and of denormal numbers.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace emulator {

constexpr float CANONICAL_NAN = std::bit_cast<float>(0x7fffffffu);  // which a GPU's instructions give
inline bool is_nan(float f) { return f != f; }

struct BF16 {
  static float widen(uint32_t x) { return std::bit_cast<float>(x << 16); }
  static uint16_t narrow(float f) {
    uint32_t x = std::bit_cast<uint32_t>(f);
    return is_nan(f) ? 0x7fff : (x + 0x7fff + (x >> 16 & 1)) >> 16;
  }
  static constexpr uint16_t infinity = 0x7f80;
};
struct F16 {
  static float widen(uint32_t x) { return (float)std::bit_cast<_Float16>((uint16_t)x); }
  static uint16_t narrow(float f) { return is_nan(f) ? 0x7fff : std::bit_cast<uint16_t>((_Float16)f); }
  static constexpr uint16_t infinity = 0x7c00;
};
struct TF32 {
  static float widen(uint32_t x) {
    return std::bit_cast<float>(x & 0xffffe000u);
  }  // matrix units ignore the other bits
};

// A denormal number becomes a zero with its sign.
inline float flushed(float f) {
  uint32_t x = std::bit_cast<uint32_t>(f);
  return x & 0x7f800000 ? f : std::bit_cast<float>(x & 0x80000000u);
}

// A number beats NaN, and -0 is below +0. Without branches, so that compilers vectorise it.
template <class T>
T least(T a, T b) {
  T found = (b != b) | (a < b) | ((a == b) & std::signbit(a)) ? a : b;
  return found != found ? T(CANONICAL_NAN) : found;
}
template <class T>
T greatest(T a, T b) {
  T found = (b != b) | (a > b) | ((a == b) & std::signbit(b)) ? a : b;
  return found != found ? T(CANONICAL_NAN) : found;
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
  if (error != 0 && !(std::bit_cast<uint64_t>(sum) & 1)) sum = step(sum, error > 0);
  float narrow = (float)sum;
  if ((double)narrow != sum && !(std::bit_cast<uint32_t>(narrow) & 1)) narrow = step(narrow, sum > (double)narrow);
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
  double power = std::bit_cast<double>(((int64_t)(int32_t)n + 1023) << 52);
  float result = (float)(p * power);
  return is_nan(x) ? CANONICAL_NAN : result;
}

}  // namespace emulator
