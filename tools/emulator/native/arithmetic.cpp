// Instructions that work lane by lane on registers: integers, floating point numbers, conversions, predicates.
#include <algorithm>
#include <limits>

#include "machine.h"
#include "numbers.h"

namespace emulator {
namespace {

template <class T>
void write(T* to, const T* values, u32 lanes) {
  if (lanes == ALL) {
    memcpy(to, values, LANES * sizeof(T));
  } else {
    for (int lane : each(lanes)) to[lane] = values[lane];
  }
}

// The functions compute all lanes, which compilers vectorise, and write those that execute.
template <class D, class A, class F>
void unary(Table& table, const std::string& name, F) {
  table[name] = [](Warp& w, const Instruction& i, u32 lanes) {
    const A* a = operand<A>(w, i, 1);
    alignas(64) D result[LANES];
    F f;
    for (int lane = 0; lane < LANES; ++lane) result[lane] = f(a[lane]);
    write(operand<D>(w, i, 0), result, lanes);
  };
}
template <class D, class A, class B, class F>
void binary(Table& table, const std::string& name, F) {
  table[name] = [](Warp& w, const Instruction& i, u32 lanes) {
    const A* a = operand<A>(w, i, 1);
    const B* b = operand<B>(w, i, 2);
    alignas(64) D result[LANES];
    F f;
    for (int lane = 0; lane < LANES; ++lane) result[lane] = f(a[lane], b[lane]);
    write(operand<D>(w, i, 0), result, lanes);
  };
}
template <class D, class A, class B, class C, class F>
void ternary(Table& table, const std::string& name, F) {
  table[name] = [](Warp& w, const Instruction& i, u32 lanes) {
    const A* a = operand<A>(w, i, 1);
    const B* b = operand<B>(w, i, 2);
    const C* c = operand<C>(w, i, 3);
    alignas(64) D result[LANES];
    F f;
    for (int lane = 0; lane < LANES; ++lane) result[lane] = f(a[lane], b[lane], c[lane]);
    write(operand<D>(w, i, 0), result, lanes);
  };
}

u32 mask_of(const u8* truths) {  // of 0 or 1 each
  u32 mask = 0;
  for (int k = 0; k < 4; ++k) {
    u64 eight;
    memcpy(&eight, truths + 8 * k, 8);
    mask |= (u32)(eight * 0x0102040810204080ull >> 56) << 8 * k;  // gathers the bits in the highest byte
  }
  return mask;
}
template <class A, class F>
void compare(Table& table, const std::string& name, F) {
  table[name] = [](Warp& w, const Instruction& i, u32 lanes) {
    const A* a = operand<A>(w, i, 1);
    const A* b = operand<A>(w, i, 2);
    alignas(32) u8 truths[LANES];
    F f;
    for (int lane = 0; lane < LANES; ++lane) truths[lane] = f(a[lane], b[lane]);
    set_predicate(operand<u32>(w, i, 0), lanes, mask_of(truths));
  };
}
template <class T>
void select(Table& table, const std::string& name) {
  table[name] = [](Warp& w, const Instruction& i, u32 lanes) {
    const T *a = operand<T>(w, i, 1), *b = operand<T>(w, i, 2);
    u32 chosen = *operand<u32>(w, i, 3);
    alignas(64) T result[LANES];
    for (int lane = 0; lane < LANES; ++lane) result[lane] = chosen >> lane & 1 ? a[lane] : b[lane];
    write(operand<T>(w, i, 0), result, lanes);
  };
}

template <class A>
void integer_comparisons(Table& t, const std::string& type) {
  compare<A>(t, "setp.eq." + type, [](A a, A b) { return a == b; });
  compare<A>(t, "setp.ne." + type, [](A a, A b) { return a != b; });
  compare<A>(t, "setp.lt." + type, [](A a, A b) { return a < b; });
  compare<A>(t, "setp.le." + type, [](A a, A b) { return a <= b; });
  compare<A>(t, "setp.gt." + type, [](A a, A b) { return a > b; });
  compare<A>(t, "setp.ge." + type, [](A a, A b) { return a >= b; });
}

template <class T>
struct Same {
  static T widen(T x) { return x; }
};
struct Flushed {
  static float widen(float x) { return flushed(x); }
};
// With NaN, the first six are false and those with a "u" true. Format::widen makes a number of what a register holds.
template <class A, class Format>
void float_comparisons(Table& t, const std::string& type) {
  using V = decltype(Format::widen(A()));
  auto add = [&]<class F>(const char* how, F) {
    compare<A>(t, std::string("setp.") + how + "." + type,
               [](A a, A b) { return F()((V)Format::widen(a), (V)Format::widen(b)); });
  };
  add("eq", [](V a, V b) { return a == b; });
  add("ne", [](V a, V b) { return a < b || a > b; });
  add("lt", [](V a, V b) { return a < b; });
  add("le", [](V a, V b) { return a <= b; });
  add("gt", [](V a, V b) { return a > b; });
  add("ge", [](V a, V b) { return a >= b; });
  add("equ", [](V a, V b) { return !(a < b || a > b); });
  add("neu", [](V a, V b) { return a != b; });
  add("ltu", [](V a, V b) { return !(a >= b); });
  add("leu", [](V a, V b) { return !(a > b); });
  add("gtu", [](V a, V b) { return !(a <= b); });
  add("geu", [](V a, V b) { return !(a < b); });
  add("num", [](V a, V b) { return a == a && b == b; });
  add("nan", [](V a, V b) { return a != a || b != b; });
}

template <class U, class S>
void integers(Table& t, const std::string& bits) {
  constexpr u32 width = 8 * sizeof(U);
  binary<U, U, U>(t, "add." + bits, [](U a, U b) { return U(a + b); });
  binary<U, U, U>(t, "sub." + bits, [](U a, U b) { return U(a - b); });
  binary<U, U, U>(t, "mul.lo." + bits, [](U a, U b) { return U((u64)a * b); });
  ternary<U, U, U, U>(t, "mad.lo." + bits, [](U a, U b, U c) { return U((u64)a * b + c); });
  binary<U, U, U>(t, "and." + bits, [](U a, U b) { return U(a & b); });
  binary<U, U, U>(t, "or." + bits, [](U a, U b) { return U(a | b); });
  binary<U, U, U>(t, "xor." + bits, [](U a, U b) { return U(a ^ b); });
  unary<U, U>(t, "not." + bits, [](U a) { return U(~a); });
  unary<U, U>(t, "neg." + bits, [](U a) { return U(0 - a); });
  unary<S, S>(t, "abs.s" + bits, [](S a) { return S(a < 0 ? 0 - (U)a : a); });
  unary<U, U>(t, "mov." + bits, [](U a) { return a; });
  binary<U, U, u32>(t, "shl." + bits, [](U a, u32 b) { return b >= width ? U(0) : U(a << b); });
  binary<U, U, u32>(t, "shr.u" + bits, [](U a, u32 b) { return b >= width ? U(0) : U(a >> b); });
  binary<S, S, u32>(t, "shr.s" + bits, [](S a, u32 b) { return S(a >> (b >= width ? width - 1 : b)); });
  binary<S, S, S>(t, "min.s" + bits, [](S a, S b) { return a < b ? a : b; });
  binary<S, S, S>(t, "max.s" + bits, [](S a, S b) { return a > b ? a : b; });
  binary<U, U, U>(t, "min.u" + bits, [](U a, U b) { return a < b ? a : b; });
  binary<U, U, U>(t, "max.u" + bits, [](U a, U b) { return a > b ? a : b; });
  binary<S, S, S>(t, "div.s" + bits, [](S a, S b) { return b == 0 ? S(-1) : b == -1 ? S(0 - (U)a) : S(a / b); });
  binary<S, S, S>(t, "rem.s" + bits, [](S a, S b) { return b == 0 ? a : b == -1 ? S(0) : S(a % b); });
  binary<U, U, U>(t, "div.u" + bits, [](U a, U b) { return b == 0 ? U(-1) : U(a / b); });
  binary<U, U, U>(t, "rem.u" + bits, [](U a, U b) { return b == 0 ? a : U(a % b); });
  select<U>(t, "selp." + bits);
  integer_comparisons<S>(t, "s" + bits);
  integer_comparisons<U>(t, "u" + bits);
}

template <class A, class W>
void wide_products(Table& t, const std::string& type) {
  binary<A, A, A>(t, "mul.hi." + type, [](A a, A b) { return A((W)a * b >> 8 * sizeof(A)); });
  if constexpr (sizeof(W) <= 8) {
    binary<W, A, A>(t, "mul.wide." + type, [](A a, A b) { return W((W)a * b); });
    ternary<W, A, A, W>(t, "mad.wide." + type, [](A a, A b, W c) { return W((W)a * b + c); });
  }
}

void bits(Table& t) {
  ternary<u32, u32, u32, u32>(t, "bfe.u32", [](u32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    u32 shifted = position > 31 ? 0 : a >> position;
    return shifted & (length > 31 ? ALL : (1u << length) - 1);
  });
  ternary<i32, i32, u32, u32>(t, "bfe.s32", [](i32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (!length) return 0;
    if (position > 31) return a < 0 ? -1 : 0;
    u32 kept = std::min(31u, position + length - 1) - position + 1;
    return (i32)((u32)(a >> position) << (32 - kept)) >> (32 - kept);
  });
  unary<u32, u32>(t, "popc.32", [](u32 a) { return (u32)__builtin_popcount(a); });
  unary<u32, u64>(t, "popc.64", [](u64 a) { return (u32)__builtin_popcountll(a); });
  unary<u32, u32>(t, "clz.32", [](u32 a) { return a ? (u32)__builtin_clz(a) : 32u; });
  unary<u32, u32>(t, "brev.32", [](u32 a) {
    u32 r = 0;
    for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
    return r;
  });
  ternary<u32, u32, u32, u32>(t, "prmt.32", [](u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 r = 0;
    for (int k = 0; k < 4; ++k) {
      u32 nibble = selector >> 4 * k & 15;
      u8 byte = both >> 8 * (nibble & 7);
      if (nibble & 8) byte = byte & 128 ? 255 : 0;
      r |= (u32)byte << 8 * k;
    }
    return r;
  });
  ternary<u32, u32, u32, u32>(t, "shf.l.wrap",
                              [](u32 a, u32 b, u32 c) { return u32(((u64)b << 32 | a) << (c & 31) >> 32); });
  ternary<u32, u32, u32, u32>(t, "shf.r.wrap", [](u32 a, u32 b, u32 c) { return u32(((u64)b << 32 | a) >> (c & 31)); });
  binary<u32, u32, u32>(t, "add.16x2", [](u32 a, u32 b) { return ((a + b) & 0xffff) | ((a >> 16) + (b >> 16)) << 16; });
  binary<u32, u32, u32>(t, "sub.16x2", [](u32 a, u32 b) { return ((a - b) & 0xffff) | ((a >> 16) - (b >> 16)) << 16; });
  t["lop3"] = [](Warp& w, const Instruction& i, u32 lanes) {
    const u32 *a = operand<u32>(w, i, 1), *b = operand<u32>(w, i, 2), *c = operand<u32>(w, i, 3);
    u32 result[LANES] = {};
    for (int k = 0; k < 8; ++k) {
      if (!(i.imm[0] >> k & 1)) continue;
      u32 x = k & 4 ? 0 : ALL, y = k & 2 ? 0 : ALL, z = k & 1 ? 0 : ALL;
      for (int lane = 0; lane < LANES; ++lane) result[lane] |= (a[lane] ^ x) & (b[lane] ^ y) & (c[lane] ^ z);
    }
    write(operand<u32>(w, i, 0), result, lanes);
  };
  t["bfi"] = [](Warp& w, const Instruction& i, u32 lanes) {
    const u32 *a = operand<u32>(w, i, 1), *b = operand<u32>(w, i, 2);
    const u32 *c = operand<u32>(w, i, 3), *d = operand<u32>(w, i, 4);
    u32 result[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      u32 position = c[lane] & 255, length = d[lane] & 255;
      u32 field = position > 31 || !length ? 0 : (length > 31 ? ALL : (1u << length) - 1) << position;
      result[lane] = (b[lane] & ~field) | ((position > 31 ? 0 : a[lane] << position) & field);
    }
    write(operand<u32>(w, i, 0), result, lanes);
  };
}

// Singles and doubles; ".ftz" makes denormal numbers zero before and after.
template <class T, class Flush>
void floats(Table& t, const std::string& type, Flush) {
  auto two = [&]<class F>(const char* name, F) {
    binary<T, T, T>(t, name + type, [](T a, T b) { return Flush()(F()(Flush()(a), Flush()(b))); });
  };
  auto one = [&]<class F>(const char* name, F) {
    unary<T, T>(t, name + type, [](T a) { return Flush()(F()(Flush()(a))); });
  };
  two("add", [](T a, T b) { return a + b; });
  two("sub", [](T a, T b) { return a - b; });
  two("mul", [](T a, T b) { return a * b; });
  two("div", [](T a, T b) { return a / b; });
  ternary<T, T, T, T>(t, "fma" + type,
                      [](T a, T b, T c) { return Flush()(std::fma(Flush()(a), Flush()(b), Flush()(c))); });
  one("sqrt", [](T a) { return std::sqrt(a); });
  one("rsqrt", [](T a) { return T(1.0 / std::sqrt((double)a)); });
  one("rcp", [](T a) { return T(1) / a; });
  one("neg", [](T a) { return -a; });
  one("abs", [](T a) { return std::fabs(a); });
  one("sin", [](T a) { return T(std::sin((double)a)); });
  one("cos", [](T a) { return T(std::cos((double)a)); });
  two("min", [](T a, T b) { return least(a, b); });
  two("max", [](T a, T b) { return greatest(a, b); });
  auto three = [&]<class F>(const char* name, F) {
    ternary<T, T, T, T>(t, name + type, [](T a, T b, T c) { return F()(F()(Flush()(a), Flush()(b)), Flush()(c)); });
  };
  three("min3", [](T a, T b) { return least(a, b); });
  three("max3", [](T a, T b) { return greatest(a, b); });
}

template <class Flush>
void extremes_with_nan(Table& t, const std::string& ftz, Flush) {  // NaN wins
  binary<float, float, float>(t, "min" + ftz + ".NaN.f32", [](float a, float b) {
    return is_nan(a) || is_nan(b) ? as_float(NAN_BITS) : least(Flush()(a), Flush()(b));
  });
  binary<float, float, float>(t, "max" + ftz + ".NaN.f32", [](float a, float b) {
    return is_nan(a) || is_nan(b) ? as_float(NAN_BITS) : greatest(Flush()(a), Flush()(b));
  });
}

void singles(Table& t) {
  extremes_with_nan(t, "", [](float x) { return x; });
  extremes_with_nan(t, ".ftz", [](float x) { return flushed(x); });
  floats<float>(t, ".f32", [](float x) { return x; });
  floats<float>(t, ".ftz.f32", [](float x) { return flushed(x); });
  floats<double>(t, ".f64", [](double x) { return x; });
  unary<float, float>(t, "ex2.f32", [](float a) { return exp2_of(a); });
  unary<float, float>(t, "ex2.ftz.f32", [](float a) { return flushed(exp2_of(flushed(a))); });
  unary<float, float>(t, "lg2.f32", [](float a) { return (float)std::log2((double)a); });
  unary<float, float>(t, "lg2.ftz.f32", [](float a) { return flushed((float)std::log2((double)flushed(a))); });
  unary<float, float>(t, "tanh.f32", [](float a) { return (float)std::tanh((double)a); });
  float_comparisons<float, Same<float>>(t, "f32");
  float_comparisons<float, Flushed>(t, "ftz.f32");
  float_comparisons<double, Same<double>>(t, "f64");
  // Pairs of singles in one register of 64 bits.
  auto pairs = [&]<class F>(const char* name, F) {
    t[name] = [](Warp& w, const Instruction& i, u32 lanes) {
      const float *a = operand<float>(w, i, 1), *b = operand<float>(w, i, 2);
      const float* c = i.at[3] < 0 ? a : operand<float>(w, i, 3);
      u64 result[LANES];
      float both[2 * LANES];
      for (int k = 0; k < 2 * LANES; ++k) both[k] = F()(a[k], b[k], c[k]);
      memcpy(result, both, sizeof result);
      write(operand<u64>(w, i, 0), result, lanes);
    };
  };
  pairs("add.f32x2", [](float a, float b, float) { return a + b; });
  pairs("sub.f32x2", [](float a, float b, float) { return a - b; });
  pairs("mul.f32x2", [](float a, float b, float) { return a * b; });
  pairs("fma.f32x2", [](float a, float b, float c) { return std::fma(a, b, c); });
}

template <class Format>
void halves(Table& t, const std::string& type) {
  auto two = [&]<class F>(const char* name, F) {
    binary<u16, u16, u16>(t, name + type,
                          [](u16 a, u16 b) { return Format::narrow(F()(Format::widen(a), Format::widen(b))); });
    binary<u32, u32, u32>(t, name + type + "x2", [](u32 a, u32 b) {
      u32 low = Format::narrow(F()(Format::widen(a & 0xffff), Format::widen(b & 0xffff)));
      return low | (u32)Format::narrow(F()(Format::widen(a >> 16), Format::widen(b >> 16))) << 16;
    });
  };
  two("add.", [](float a, float b) { return a + b; });
  two("sub.", [](float a, float b) { return a - b; });
  two("mul.", [](float a, float b) { return a * b; });
  two("min.", [](float a, float b) { return least(a, b); });
  two("max.", [](float a, float b) { return greatest(a, b); });
  auto fma = [](u32 a, u32 b, u32 c) {
    return Format::narrow(sum_to_odd((double)Format::widen(a) * Format::widen(b), Format::widen(c)));
  };
  using Fma = decltype(fma);
  ternary<u16, u16, u16, u16>(t, "fma." + type, [](u16 a, u16 b, u16 c) { return Fma()(a, b, c); });
  ternary<u32, u32, u32, u32>(t, "fma." + type + "x2", [](u32 a, u32 b, u32 c) {
    return Fma()(a & 0xffff, b & 0xffff, c & 0xffff) | (u32)Fma()(a >> 16, b >> 16, c >> 16) << 16;
  });
  unary<u16, u16>(t, "neg." + type, [](u16 a) { return u16(a ^ 0x8000); });
  unary<u16, u16>(t, "abs." + type, [](u16 a) { return u16(a & 0x7fff); });
  unary<u32, u32>(t, "neg." + type + "x2", [](u32 a) { return a ^ 0x80008000u; });
  unary<u32, u32>(t, "abs." + type + "x2", [](u32 a) { return a & 0x7fff7fffu; });
  float_comparisons<u16, Format>(t, type);
  // Of a pair, into two predicates.
  t["setp.num." + type + "x2"] = [](Warp& w, const Instruction& i, u32 lanes) {
    const u32 *a = operand<u32>(w, i, 2), *b = operand<u32>(w, i, 3);
    auto number = [](u32 x) { return (x & 0x7fff) <= Format::infinity; };
    u32 low = 0, high = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      low |= (u32)(number(a[lane]) && number(b[lane])) << lane;
      high |= (u32)(number(a[lane] >> 16) && number(b[lane] >> 16)) << lane;
    }
    set_predicate(operand<u32>(w, i, 0), lanes, low);
    set_predicate(operand<u32>(w, i, 1), lanes, high);
  };
  binary<float, u16, float>(t, "add.f32." + type, [](u16 a, float b) { return Format::widen(a) + b; });
  binary<float, u16, float>(t, "sub.f32." + type, [](u16 a, float b) { return Format::widen(a) - b; });
  ternary<float, u16, u16, float>(
      t, "fma.f32." + type, [](u16 a, u16 b, float c) { return std::fma(Format::widen(a), Format::widen(b), c); });
  unary<float, u16>(t, "cvt.f32." + type, [](u16 a) { return Format::widen(a); });
  unary<double, u16>(t, "cvt.f64." + type, [](u16 a) { return (double)Format::widen(a); });
  unary<u16, float>(t, "cvt." + type + ".f32", [](float a) { return Format::narrow(a); });
  binary<u32, float, float>(t, "cvt." + type + "x2.f32",
                            [](float a, float b) { return (u32)Format::narrow(a) << 16 | Format::narrow(b); });
}

// Registers may be wider than the types: the low bits count, and the result is extended.
template <class From, class Register, class To, class Result>
void conversion(Table& t, const std::string& to, const std::string& from) {
  if constexpr (sizeof(From) <= sizeof(Register) && sizeof(To) <= sizeof(Result)) {
    const std::string name = "cvt." + to + "." + std::to_string(8 * sizeof(Result)) + "." + from;
    unary<Result, Register>(t, name, [](Register a) { return (Result)(To)(From)a; });
  }
}
template <class From, class Register, class To>
void conversions_to(Table& t, const std::string& to, const std::string& from) {
  conversion<From, Register, To, u16>(t, to, from);
  conversion<From, Register, To, u32>(t, to, from);
  conversion<From, Register, To, u64>(t, to, from);
}
template <class From, class Register>
void conversions_from(Table& t, const std::string& type) {
  if constexpr (sizeof(From) <= sizeof(Register)) {
    const std::string from = type + "." + std::to_string(8 * sizeof(Register));
    conversions_to<From, Register, int8_t>(t, "s8", from);
    conversions_to<From, Register, u8>(t, "u8", from);
    conversions_to<From, Register, i16>(t, "s16", from);
    conversions_to<From, Register, u16>(t, "u16", from);
    conversions_to<From, Register, i32>(t, "s32", from);
    conversions_to<From, Register, u32>(t, "u32", from);
    conversions_to<From, Register, i64>(t, "s64", from);
    conversions_to<From, Register, u64>(t, "u64", from);
    unary<float, Register>(t, "cvt.f32." + from, [](Register a) { return (float)(From)a; });
    unary<double, Register>(t, "cvt.f64." + from, [](Register a) { return (double)(From)a; });
  }
}
template <class From>
void integer_conversions(Table& t, const std::string& type) {
  conversions_from<From, u16>(t, type);
  conversions_from<From, u32>(t, type);
  conversions_from<From, u64>(t, type);
}

// The nearest that there is. NaN gives 0, or the highest bit alone where something has 64 bits.
template <class To, class From>
To saturated(From a) {
  constexpr double low = (double)std::numeric_limits<To>::min(), high = (double)std::numeric_limits<To>::max();
  const double d = a;
  if (d != d) return sizeof(To) == 8 || sizeof(From) == 8 ? To(1ull << (8 * sizeof(To) - 1)) : To(0);
  return d <= low ? std::numeric_limits<To>::min() : d >= high ? std::numeric_limits<To>::max() : To(d);
}
template <class From, class Flush>
void to_integers(Table& t, const std::string& ftz, const std::string& from, Flush) {
  auto add = [&]<class R>(const char* rounding, R) {
    const std::string start = std::string("cvt.") + rounding + ftz;
    unary<i32, From>(t, start + ".s32." + from, [](From a) { return saturated<i32>(R()(Flush()(a))); });
    unary<u32, From>(t, start + ".u32." + from, [](From a) { return saturated<u32>(R()(Flush()(a))); });
    unary<i64, From>(t, start + ".s64." + from, [](From a) { return saturated<i64>(R()(Flush()(a))); });
    unary<u64, From>(t, start + ".u64." + from, [](From a) { return saturated<u64>(R()(Flush()(a))); });
    unary<From, From>(t, start + "." + from + "." + from, [](From a) { return (From)R()(Flush()(a)); });
  };
  add("rzi", [](From a) { return std::trunc(a); });
  add("rmi", [](From a) { return std::floor(a); });
  add("rpi", [](From a) { return std::ceil(a); });
  add("rni", [](From a) { return std::nearbyint(a); });
}

void conversions(Table& t) {
  integer_conversions<int8_t>(t, "s8");
  integer_conversions<u8>(t, "u8");
  integer_conversions<i16>(t, "s16");
  integer_conversions<u16>(t, "u16");
  integer_conversions<i32>(t, "s32");
  integer_conversions<u32>(t, "u32");
  integer_conversions<i64>(t, "s64");
  integer_conversions<u64>(t, "u64");
  to_integers<float>(t, "", "f32", [](float a) { return a; });
  to_integers<float>(t, ".ftz", "f32", [](float a) { return flushed(a); });
  to_integers<double>(t, "", "f64", [](double a) { return a; });
  unary<double, float>(t, "cvt.f64.f32", [](float a) { return (double)a; });
  unary<float, double>(t, "cvt.f32.f64", [](double a) { return (float)a; });
  auto saturate = [](float a) { return is_nan(a) ? 0.f : std::min(1.f, std::max(0.f, a)); };
  using Saturate = decltype(saturate);
  unary<float, float>(t, "cvt.sat.f32.f32", saturate);
  unary<float, float>(t, "cvt.sat.ftz.f32.f32", [](float a) { return Saturate()(flushed(a)); });
  unary<u32, float>(t, "cvt.tf32.f32", [](float a) {
    u32 x = as_bits(a);
    return (x & 0x7f800000) == 0x7f800000 ? x : (x + 0x1000) & 0xffffe000u;
  });
}

void predicates(Table& t) {
  auto two = [&]<class F>(const char* name, F) {
    t[name] = [](Warp& w, const Instruction& i, u32 lanes) {
      set_predicate(operand<u32>(w, i, 0), lanes, F()(*operand<u32>(w, i, 1), *operand<u32>(w, i, 2)));
    };
  };
  two("and.pred", [](u32 a, u32 b) { return a & b; });
  two("or.pred", [](u32 a, u32 b) { return a | b; });
  two("xor.pred", [](u32 a, u32 b) { return a ^ b; });
  t["mov.pred"] = [](Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(operand<u32>(w, i, 0), lanes, *operand<u32>(w, i, 1));
  };
  t["not.pred"] = [](Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(operand<u32>(w, i, 0), lanes, ~*operand<u32>(w, i, 1));
  };
}

template <class Wide, class Narrow>
void packing(Table& t, const std::string& type) {
  constexpr int parts = sizeof(Wide) / sizeof(Narrow);
  t["pack." + type] = [](Warp& w, const Instruction& i, u32 lanes) {
    Wide result[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      Narrow part[parts];
      for (int k = 0; k < parts; ++k) part[k] = at_offset<Narrow>(w, i.list[k])[lane];
      memcpy(&result[lane], part, sizeof(Wide));
    }
    write(operand<Wide>(w, i, 0), result, lanes);
  };
  t["unpack." + type] = [](Warp& w, const Instruction& i, u32 lanes) {
    Wide whole[LANES];
    memcpy(whole, operand<Wide>(w, i, 0), sizeof whole);
    for (int k = 0; k < parts; ++k) {
      if (i.list[k] < 0) continue;
      Narrow result[LANES];
      for (int lane = 0; lane < LANES; ++lane)
        memcpy(&result[lane], (u8*)&whole[lane] + k * sizeof(Narrow), sizeof(Narrow));
      write(at_offset<Narrow>(w, i.list[k]), result, lanes);
    }
  };
}

}  // namespace

void add_arithmetic(Table& t) {
  integers<u16, i16>(t, "16");
  integers<u32, i32>(t, "32");
  integers<u64, i64>(t, "64");
  wide_products<i16, i32>(t, "s16");
  wide_products<u16, u32>(t, "u16");
  wide_products<i32, i64>(t, "s32");
  wide_products<u32, u64>(t, "u32");
  wide_products<i64, __int128>(t, "s64");
  wide_products<u64, unsigned __int128>(t, "u64");
  bits(t);
  singles(t);
  halves<BF16>(t, "bf16");
  halves<F16>(t, "f16");
  conversions(t);
  predicates(t);
  packing<u32, u16>(t, "32.16");
  packing<u64, u32>(t, "64.32");
  packing<u64, u16>(t, "64.16");
  packing<u64, u8>(t, "64.8");
  packing<u32, u8>(t, "32.8");
  t["nop"] = [](Warp&, const Instruction&, u32) {};
}

}  // namespace emulator
