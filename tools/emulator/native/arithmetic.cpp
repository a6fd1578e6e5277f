// Instructions that work lane by lane on registers: integers, floating point numbers, conversions, predicates.
#include <algorithm>
#include <limits>
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace emulator {
namespace {

template <int parts = 1, class T>
void write(T* to, const T* values, u32 lanes) {
  if (lanes == ALL) {
    memcpy(to, values, parts * LANES * sizeof(T));
  } else {
    for (int lane : each(lanes)) memcpy(to + parts * lane, values + parts * lane, parts * sizeof(T));
  }
}

u32 mask_of(const bool* truths) {
  u32 mask = 0;
  for (int k = 0; k < 4; ++k) {
    u64 eight;
    memcpy(&eight, truths + 8 * k, 8);
    mask |= (u32)(eight * 0x0102040810204080ull >> 56) << 8 * k;  // gathers the bits in the highest byte
  }
  return mask;
}

// All lanes are computed, which compilers vectorise, and those that execute are written.
template <int parts, class F, class Result, class... Operands>
void add_function(Table& table, const std::string& name, Result (F::*)(Operands...) const) {
  table[name] = [](Warp& w, const Instruction& i, u32 lanes) {
    alignas(64) Result result[parts * LANES];
    [&]<size_t... k>(std::index_sequence<k...>) {
      for (int at = 0; at < parts * LANES; ++at) result[at] = F()(operand<Operands>(w, i, k + 1)[at]...);
    }(std::index_sequence_for<Operands...>());
    if constexpr (std::is_same_v<Result, bool>) {
      set_predicate(operand<u32>(w, i, 0), lanes, mask_of(result));
    } else {
      write<parts>(operand<Result>(w, i, 0), result, lanes);
    }
  };
}
// An instruction is a function whose types are those of the registers; bool is for a predicate. Registers may have two
// parts, which are computed alike.
template <int parts = 1, class F>
void add(Table& table, const std::string& name, F) {
  add_function<parts, F>(table, name, &F::operator());
}

template <class T>
std::string bits_of() {
  return std::to_string(8 * sizeof(T));
}
template <class T>
std::string type_of() {
  return std::string(std::is_signed_v<T> ? "s" : "u") + bits_of<T>();
}

template <class T>
void select(Table& table) {
  table["selp." + bits_of<T>()] = [](Warp& w, const Instruction& i, u32 lanes) {
    const T *a = operand<T>(w, i, 1), *b = operand<T>(w, i, 2);
    u32 chosen = *operand<u32>(w, i, 3);
    alignas(64) T result[LANES];
    for (int lane = 0; lane < LANES; ++lane) result[lane] = chosen >> lane & 1 ? a[lane] : b[lane];
    write(operand<T>(w, i, 0), result, lanes);
  };
}

// What becomes of an operand before it is used, and of a result.
constexpr auto same = [](auto x) { return x; };
constexpr auto flush = [](float x) { return flushed(x); };

// A is what a register holds, and Widen makes a number of it.
template <class A, class Widen>
void comparisons(Table& t, const std::string& type, Widen) {
  using V = decltype(Widen()(A()));
  auto compare = [&]<class F>(const char* how, F) {
    add(t, std::string("setp.") + how + "." + type, [](A a, A b) { return F()(Widen()(a), Widen()(b)); });
  };
  compare("eq", [](V a, V b) { return a == b; });
  compare("ne", [](V a, V b) { return a < b || a > b; });
  compare("lt", [](V a, V b) { return a < b; });
  compare("le", [](V a, V b) { return a <= b; });
  compare("gt", [](V a, V b) { return a > b; });
  compare("ge", [](V a, V b) { return a >= b; });
  if constexpr (std::is_floating_point_v<V>) {  // with NaN, those above are false and those with a "u" true
    compare("equ", [](V a, V b) { return !(a < b || a > b); });
    compare("neu", [](V a, V b) { return a != b; });
    compare("ltu", [](V a, V b) { return !(a >= b); });
    compare("leu", [](V a, V b) { return !(a > b); });
    compare("gtu", [](V a, V b) { return !(a <= b); });
    compare("geu", [](V a, V b) { return !(a < b); });
    compare("num", [](V a, V b) { return a == a && b == b; });
    compare("nan", [](V a, V b) { return a != a || b != b; });
  }
}

template <class U>
void integers(Table& t) {
  using S = std::make_signed_t<U>;
  constexpr u32 width = 8 * sizeof(U);
  const std::string bits = bits_of<U>();
  add(t, "add." + bits, [](U a, U b) { return U(a + b); });
  add(t, "sub." + bits, [](U a, U b) { return U(a - b); });
  add(t, "mul.lo." + bits, [](U a, U b) { return U((u64)a * b); });
  add(t, "mad.lo." + bits, [](U a, U b, U c) { return U((u64)a * b + c); });
  add(t, "and." + bits, [](U a, U b) { return U(a & b); });
  add(t, "or." + bits, [](U a, U b) { return U(a | b); });
  add(t, "xor." + bits, [](U a, U b) { return U(a ^ b); });
  add(t, "not." + bits, [](U a) { return U(~a); });
  add(t, "neg." + bits, [](U a) { return U(0 - a); });
  add(t, "abs.s" + bits, [](S a) { return S(a < 0 ? 0 - (U)a : a); });
  add(t, "mov." + bits, [](U a) { return a; });
  add(t, "shl." + bits, [](U a, u32 b) { return b >= width ? U(0) : U(a << b); });
  add(t, "shr.u" + bits, [](U a, u32 b) { return b >= width ? U(0) : U(a >> b); });
  add(t, "shr.s" + bits, [](S a, u32 b) { return S(a >> (b >= width ? width - 1 : b)); });
  add(t, "min.s" + bits, [](S a, S b) { return a < b ? a : b; });
  add(t, "max.s" + bits, [](S a, S b) { return a > b ? a : b; });
  add(t, "min.u" + bits, [](U a, U b) { return a < b ? a : b; });
  add(t, "max.u" + bits, [](U a, U b) { return a > b ? a : b; });
  add(t, "div.s" + bits, [](S a, S b) { return b == 0 ? S(-1) : b == -1 ? S(0 - (U)a) : S(a / b); });
  add(t, "rem.s" + bits, [](S a, S b) { return b == 0 ? a : b == -1 ? S(0) : S(a % b); });
  add(t, "div.u" + bits, [](U a, U b) { return b == 0 ? U(-1) : U(a / b); });
  add(t, "rem.u" + bits, [](U a, U b) { return b == 0 ? a : U(a % b); });
  select<U>(t);
  comparisons<S>(t, "s" + bits, same);
  comparisons<U>(t, "u" + bits, same);
}

template <class A, class W>
void wide_products(Table& t) {
  add(t, "mul.hi." + type_of<A>(), [](A a, A b) { return A((W)a * b >> 8 * sizeof(A)); });
  if constexpr (sizeof(W) <= 8) {
    add(t, "mul.wide." + type_of<A>(), [](A a, A b) { return W((W)a * b); });
    add(t, "mad.wide." + type_of<A>(), [](A a, A b, W c) { return W((W)a * b + c); });
  }
}

void bits(Table& t) {
  add(t, "bfe.u32", [](u32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    u32 shifted = position > 31 ? 0 : a >> position;
    return shifted & (length > 31 ? ALL : (1u << length) - 1);
  });
  add(t, "bfe.s32", [](i32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (!length) return 0;
    if (position > 31) return a < 0 ? -1 : 0;
    u32 kept = std::min(31u, position + length - 1) - position + 1;
    return (i32)((u32)(a >> position) << (32 - kept)) >> (32 - kept);
  });
  add(t, "bfi", [](u32 a, u32 b, u32 position, u32 length) {
    position &= 255, length &= 255;
    u32 field = position > 31 || !length ? 0 : (length > 31 ? ALL : (1u << length) - 1) << position;
    return (b & ~field) | ((position > 31 ? 0 : a << position) & field);
  });
  add(t, "popc.32", [](u32 a) { return (u32)__builtin_popcount(a); });
  add(t, "popc.64", [](u64 a) { return (u32)__builtin_popcountll(a); });
  add(t, "clz.32", [](u32 a) { return a ? (u32)__builtin_clz(a) : 32u; });
  add(t, "brev.32", [](u32 a) {
    u32 r = 0;
    for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
    return r;
  });
  add(t, "prmt.32", [](u32 a, u32 b, u32 selector) {
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
  add(t, "shf.l.wrap", [](u32 a, u32 b, u32 c) { return u32(((u64)b << 32 | a) << (c & 31) >> 32); });
  add(t, "shf.r.wrap", [](u32 a, u32 b, u32 c) { return u32(((u64)b << 32 | a) >> (c & 31)); });
  add<2>(t, "add.16x2", [](u16 a, u16 b) { return u16(a + b); });
  add<2>(t, "sub.16x2", [](u16 a, u16 b) { return u16(a - b); });
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
}

// Singles and doubles; ".ftz" makes denormal numbers zero before and after.
template <class T, class Flush>
void floats(Table& t, const std::string& type, Flush) {
  auto one = [&]<class F>(const char* name, F) { add(t, name + type, [](T a) { return Flush()(F()(Flush()(a))); }); };
  auto two = [&]<class F>(const char* name, F) {
    add(t, name + type, [](T a, T b) { return Flush()(F()(Flush()(a), Flush()(b))); });
  };
  auto three = [&]<class F>(const char* name, F) {
    add(t, name + type, [](T a, T b, T c) { return Flush()(F()(Flush()(a), Flush()(b), Flush()(c))); });
  };
  two("add", [](T a, T b) { return a + b; });
  two("sub", [](T a, T b) { return a - b; });
  two("mul", [](T a, T b) { return a * b; });
  two("div", [](T a, T b) { return a / b; });
  three("fma", [](T a, T b, T c) { return std::fma(a, b, c); });
  one("sqrt", [](T a) { return std::sqrt(a); });
  one("rsqrt", [](T a) { return T(1.0 / std::sqrt((double)a)); });
  one("rcp", [](T a) { return T(1) / a; });
  one("neg", [](T a) { return -a; });
  one("abs", [](T a) { return std::fabs(a); });
  two("min", [](T a, T b) { return least(a, b); });
  two("max", [](T a, T b) { return greatest(a, b); });
  comparisons<T>(t, type.substr(1), Flush());
  if constexpr (std::is_same_v<T, float>) {
    one("sin", [](float a) { return (float)std::sin((double)a); });
    one("cos", [](float a) { return (float)std::cos((double)a); });
    one("tanh", [](float a) { return (float)std::tanh((double)a); });
    one("ex2", [](float a) { return exp2_of(a); });
    one("lg2", [](float a) { return (float)std::log2((double)a); });
    three("min3", [](float a, float b, float c) { return least(least(a, b), c); });
    three("max3", [](float a, float b, float c) { return greatest(greatest(a, b), c); });
    two("min.NaN", [](float a, float b) { return is_nan(a) || is_nan(b) ? CANONICAL_NAN : least(a, b); });
    two("max.NaN", [](float a, float b) { return is_nan(a) || is_nan(b) ? CANONICAL_NAN : greatest(a, b); });
    one("cvt.sat.f32", [](float a) { return is_nan(a) ? 0.f : std::min(1.f, std::max(0.f, a)); });
  }
}

template <class Format>
void halves(Table& t, const std::string& type) {
  auto add_both = [&](const std::string& name, auto f) {
    add(t, name + type, f);
    add<2>(t, name + type + "x2", f);
  };
  auto two = [&]<class F>(const char* name, F) {
    add_both(name, [](u16 a, u16 b) { return Format::narrow(F()(Format::widen(a), Format::widen(b))); });
  };
  two("add.", [](float a, float b) { return a + b; });
  two("sub.", [](float a, float b) { return a - b; });
  two("mul.", [](float a, float b) { return a * b; });
  two("min.", [](float a, float b) { return least(a, b); });
  two("max.", [](float a, float b) { return greatest(a, b); });
  add_both("fma.", [](u16 a, u16 b, u16 c) {
    return Format::narrow(sum_to_odd((double)Format::widen(a) * Format::widen(b), Format::widen(c)));
  });
  add_both("neg.", [](u16 a) { return u16(a ^ 0x8000); });
  add_both("abs.", [](u16 a) { return u16(a & 0x7fff); });
  comparisons<u16>(t, type, [](u16 a) { return Format::widen(a); });
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
  add(t, "add.f32." + type, [](u16 a, float b) { return Format::widen(a) + b; });
  add(t, "sub.f32." + type, [](u16 a, float b) { return Format::widen(a) - b; });
  add(t, "fma.f32." + type, [](u16 a, u16 b, float c) { return std::fma(Format::widen(a), Format::widen(b), c); });
  add(t, "cvt.f32." + type, [](u16 a) { return Format::widen(a); });
  add(t, "cvt.f64." + type, [](u16 a) { return (double)Format::widen(a); });
  add(t, "cvt." + type + ".f32", [](float a) { return Format::narrow(a); });
  add(t, "cvt." + type + "x2.f32", [](float a, float b) { return (u32)Format::narrow(a) << 16 | Format::narrow(b); });
}

void each_integer(auto f) { f(int8_t()), f(u8()), f(i16()), f(u16()), f(i32()), f(u32()), f(i64()), f(u64()); }
void each_register(auto f) { f(u16()), f(u32()), f(u64()); }

// Registers may be wider than the types: the low bits count, and the result is extended.
template <class From, class Register>
void conversions_from(Table& t) {
  const std::string from = type_of<From>() + "." + bits_of<Register>();
  each_integer([&]<class To>(To) {
    each_register([&]<class Result>(Result) {
      if constexpr (sizeof(To) <= sizeof(Result)) {
        const std::string to = type_of<To>() + "." + bits_of<Result>();
        add(t, "cvt." + to + "." + from, [](Register a) { return (Result)(To)(From)a; });
      }
    });
  });
  add(t, "cvt.f32.32." + from, [](Register a) { return (float)(From)a; });
  add(t, "cvt.f64.64." + from, [](Register a) { return (double)(From)a; });
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
  auto rounding = [&]<class R>(const char* name, R) {
    const std::string start = "cvt." + std::string(name) + ftz + ".";
    auto round_to = [&]<class To>(To) {
      add(t, start + type_of<To>() + "." + from, [](From a) { return saturated<To>(R()(Flush()(a))); });
    };
    round_to(i32()), round_to(u32()), round_to(i64()), round_to(u64());
    add(t, start + from + "." + from, [](From a) { return (From)R()(Flush()(a)); });
  };
  rounding("rzi", [](From a) { return std::trunc(a); });
  rounding("rmi", [](From a) { return std::floor(a); });
  rounding("rpi", [](From a) { return std::ceil(a); });
  rounding("rni", [](From a) { return std::nearbyint(a); });
}

void conversions(Table& t) {
  each_integer([&]<class From>(From) {
    each_register([&]<class Register>(Register) {
      if constexpr (sizeof(From) <= sizeof(Register)) conversions_from<From, Register>(t);
    });
  });
  to_integers<float>(t, "", "f32", same);
  to_integers<float>(t, ".ftz", "f32", flush);
  to_integers<double>(t, "", "f64", same);
  add(t, "cvt.f64.f32", [](float a) { return (double)a; });
  add(t, "cvt.f32.f64", [](double a) { return (float)a; });
  add(t, "cvt.tf32.f32", [](float a) {
    u32 x = std::bit_cast<u32>(a);
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
void packing(Table& t) {
  const std::string type = bits_of<Wide>() + "." + bits_of<Narrow>();
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
  integers<u16>(t);
  integers<u32>(t);
  integers<u64>(t);
  wide_products<i16, i32>(t);
  wide_products<u16, u32>(t);
  wide_products<i32, i64>(t);
  wide_products<u32, u64>(t);
  wide_products<i64, __int128>(t);
  wide_products<u64, unsigned __int128>(t);
  bits(t);
  floats<float>(t, ".f32", same);
  floats<float>(t, ".ftz.f32", flush);
  floats<double>(t, ".f64", same);
  add<2>(t, "add.f32x2", [](float a, float b) { return a + b; });
  add<2>(t, "sub.f32x2", [](float a, float b) { return a - b; });
  add<2>(t, "mul.f32x2", [](float a, float b) { return a * b; });
  add<2>(t, "fma.f32x2", [](float a, float b, float c) { return std::fma(a, b, c); });
  halves<BF16>(t, "bf16");
  halves<F16>(t, "f16");
  conversions(t);
  predicates(t);
  packing<u32, u16>(t);
  packing<u64, u32>(t);
  packing<u64, u16>(t);
  packing<u64, u8>(t);
  packing<u32, u8>(t);
  t["nop"] = [](Warp&, const Instruction&, u32) {};
}

}  // namespace emulator
