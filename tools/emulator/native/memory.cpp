// Loads, stores and atomics: global memory (the tensors of a launch), shared memory, parameters.
#include <algorithm>

#include "machine.h"
#include "numbers.h"

namespace emulator {

u8* global_memory(Warp& w, u64 address, int bytes, bool write) {
  Launch& launch = *w.block->launch;
  Region* region = launch.last;
  if (!region || address < region->low || address + bytes > region->high) {
    region = nullptr;
    for (Region& r : launch.regions) {
      if (address >= r.low && address + bytes <= r.high) region = &r;
    }
    const char* what = write ? "write" : "read";
    if (!region)
      fault(w, "global %s of %d bytes at %llx, which is in no tensor", what, bytes, (unsigned long long)address);
    launch.last = region;
  }
  if (region->valid && memchr(region->valid + (address - region->low), 0, bytes)) {
    fault(w, "global %s of %d bytes at %llx, between the rows of a view", write ? "write" : "read", bytes,
          (unsigned long long)address);
  }
  return reinterpret_cast<u8*>(address);
}

u8* shared_memory(Warp& w, u64 address, int bytes, bool write) {
  Block& block = *w.block;
  if (address + bytes > block.launch->shared_bytes || (address & (std::min(bytes, 16) - 1))) {
    fault(w, "shared %s of %d bytes at %llu of %llu, outside or misaligned", write ? "write" : "read", bytes,
          (unsigned long long)address, (unsigned long long)block.launch->shared_bytes);
  }
  return block.shared.data() + address;
}

namespace {

enum Space { GLOBAL, SHARED, PARAMETER };

// at[0]: the register with the address; imm[0]: what is added to it; imm[1]: the register's bytes. In 32 bits, the sum
// wraps.
void addresses(Warp& w, const Instruction& i, u64* result) {
  for (int lane = 0; lane < LANES; ++lane) {
    const bool wide = i.imm[1] == 8;
    const u64 sum = (wide ? operand<u64>(w, i, 0)[lane] : operand<u32>(w, i, 0)[lane]) + i.imm[0];
    result[lane] = wide ? sum : (u32)sum;
  }
}

void check_alignment(Warp& w, u64 address, int bytes) {
  if (address % bytes) fault(w, "access of %d bytes at %llx, which is misaligned", bytes, (unsigned long long)address);
}

// Elements of type M in memory, R in registers: list has one register per element.
template <Space space, class M, class R>
void load(Warp& w, const Instruction& i, u32 lanes) {
  Launch& launch = *w.block->launch;
  u64 address[LANES];
  addresses(w, i, address);
  const int count = i.list.size(), bytes = count * sizeof(M);
  for (int lane : each(lanes)) {
    const u8* from;
    if constexpr (space == GLOBAL) {
      check_alignment(w, address[lane], bytes);
      from = global_memory(w, address[lane], bytes, false);
      if (launch.checks()) check_global(w, own(w, address[lane], bytes, READ));
    } else if constexpr (space == SHARED) {
      from = shared_memory(w, address[lane], bytes, false);
      if (launch.checks()) check_shared(w, own(w, address[lane], bytes, READ));
    } else {
      if (address[lane] + bytes > launch.parameter_bytes)
        fault(w, "parameter at %llu", (unsigned long long)address[lane]);
      from = launch.parameters + address[lane];
    }
    M element[8];
    memcpy(element, from, bytes);
    for (int k = 0; k < count; ++k) {
      if (i.list[k] >= 0) at_offset<R>(w, i.list[k])[lane] = (R)element[k];
    }
  }
  if (launch.counts()) {
    if constexpr (space == GLOBAL) count_global(w, i, address, lanes, bytes, false);
    if constexpr (space == SHARED) count_shared(w, i, address, lanes, bytes);
  }
}

template <Space space, class M, class R>
void store(Warp& w, const Instruction& i, u32 lanes) {
  Launch& launch = *w.block->launch;
  u64 address[LANES];
  addresses(w, i, address);
  const int count = i.list.size(), bytes = count * sizeof(M);
  for (int lane : each(lanes)) {
    M element[8];
    for (int k = 0; k < count; ++k) element[k] = (M)at_offset<R>(w, i.list[k])[lane];
    u8* to;
    if constexpr (space == GLOBAL) {
      check_alignment(w, address[lane], bytes);
      to = global_memory(w, address[lane], bytes, true);
      if (launch.checks()) check_global(w, own(w, address[lane], bytes, WRITE, element));
    } else {
      to = shared_memory(w, address[lane], bytes, true);
      if (launch.checks()) check_shared(w, own(w, address[lane], bytes, WRITE, element));
    }
    memcpy(to, element, bytes);
  }
  if (launch.counts()) {
    if constexpr (space == GLOBAL) count_global(w, i, address, lanes, bytes, true);
    if constexpr (space == SHARED) count_shared(w, i, address, lanes, bytes);
  }
}

template <class M, class R>
void add_moves(Table& t, const std::string& type) {
  const std::string name = type + "." + std::to_string(8 * sizeof(R));
  t["ld.global." + name] = load<GLOBAL, M, R>;
  t["ld.shared." + name] = load<SHARED, M, R>;
  t["ld.param." + name] = load<PARAMETER, M, R>;
  t["st.global." + name] = store<GLOBAL, M, R>;
  t["st.shared." + name] = store<SHARED, M, R>;
}

// at: address, value, second value of a compare-and-swap; list: the register of the old value, or nothing.
template <Space space, class T, class F>
void atomic(Warp& w, const Instruction& i, u32 lanes) {
  Launch& launch = *w.block->launch;
  u64 address[LANES];
  addresses(w, i, address);
  for (int lane : each(lanes)) {
    u8* place;
    check_alignment(w, address[lane], sizeof(T));
    if constexpr (space == GLOBAL) {
      place = global_memory(w, address[lane], sizeof(T), true);
      if (launch.checks()) check_global(w, own(w, address[lane], sizeof(T), ATOMIC));
    } else {
      place = shared_memory(w, address[lane], sizeof(T), true);
      if (launch.checks()) check_shared(w, own(w, address[lane], sizeof(T), ATOMIC));
    }
    T old, value = operand<T>(w, i, 1)[lane], second = i.at[2] < 0 ? T() : operand<T>(w, i, 2)[lane];
    memcpy(&old, place, sizeof old);
    T updated = F()(old, value, second);
    memcpy(place, &updated, sizeof updated);
    if (!i.list.empty() && i.list[0] >= 0) at_offset<T>(w, i.list[0])[lane] = old;
  }
  if (space == GLOBAL && launch.counts()) count_global(w, i, address, lanes, sizeof(T), true);
}

template <class T, class F>
void add_atomic(Table& t, const std::string& name, F) {
  t["atom.global." + name] = atomic<GLOBAL, T, F>;
  t["atom.shared." + name] = atomic<SHARED, T, F>;
}

template <class U, class S>
void integer_atomics(Table& t, const std::string& bits) {
  add_atomic<U>(t, "add." + bits, [](U old, U a, U) { return U(old + a); });
  add_atomic<U>(t, "and." + bits, [](U old, U a, U) { return U(old & a); });
  add_atomic<U>(t, "or." + bits, [](U old, U a, U) { return U(old | a); });
  add_atomic<U>(t, "xor." + bits, [](U old, U a, U) { return U(old ^ a); });
  add_atomic<U>(t, "exch." + bits, [](U, U a, U) { return a; });
  add_atomic<U>(t, "cas." + bits, [](U old, U expected, U a) { return old == expected ? a : old; });
  add_atomic<S>(t, "min.s" + bits, [](S old, S a, S) { return std::min(old, a); });
  add_atomic<S>(t, "max.s" + bits, [](S old, S a, S) { return std::max(old, a); });
  add_atomic<U>(t, "min.u" + bits, [](U old, U a, U) { return std::min(old, a); });
  add_atomic<U>(t, "max.u" + bits, [](U old, U a, U) { return std::max(old, a); });
}

}  // namespace

void add_memory(Table& t) {
  add_moves<u8, u16>(t, "u8");
  add_moves<u8, u32>(t, "u8");
  add_moves<u8, u64>(t, "u8");
  add_moves<int8_t, i16>(t, "s8");
  add_moves<int8_t, i32>(t, "s8");
  add_moves<int8_t, i64>(t, "s8");
  add_moves<u16, u16>(t, "u16");
  add_moves<u16, u32>(t, "u16");
  add_moves<u16, u64>(t, "u16");
  add_moves<i16, i16>(t, "s16");
  add_moves<i16, i32>(t, "s16");
  add_moves<i16, i64>(t, "s16");
  add_moves<u32, u32>(t, "u32");
  add_moves<u32, u64>(t, "u32");
  add_moves<i32, i32>(t, "s32");
  add_moves<i32, i64>(t, "s32");
  add_moves<u64, u64>(t, "u64");
  add_moves<i64, i64>(t, "s64");
  integer_atomics<u32, i32>(t, "32");
  integer_atomics<u64, i64>(t, "64");
  add_atomic<float>(t, "add.f32", [](float old, float a, float) { return old + a; });
  add_atomic<double>(t, "add.f64", [](double old, double a, double) { return old + a; });
}

}  // namespace emulator
