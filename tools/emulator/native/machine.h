// The state of an emulated GPU: what a launch, a block and a warp consist of, and what an instruction is.
//
// A warp is 32 lanes that execute one instruction together. Its warps run one after another, each until it has to wait;
// the blocks of a grid run one after another. What is asynchronous happens as late as the program allows.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor_map.h"

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL = 0xffffffffu;  // the mask of all lanes
constexpr int MAX_WARPS = 32;     // of a block

struct Warp;

// What the loop over instructions has to know about one.
enum Kind { NORMAL, BRANCH, BRANCH_INDEXED, EXIT, BARRIER, COLLECTIVE, WAIT };

struct Instruction {
  void (*run)(Warp&, const Instruction&, u32 lanes) = nullptr;
  Kind kind = NORMAL;
  int guard = -1;         // predicate without which a lane does not execute it
  bool negated = false;   // the guard is
  int at[8];              // operands: offsets in the registers of a warp in bytes, -1: absent
  i64 imm[8];             // offsets of addresses and other constants, in the order of the operands
  std::vector<int> list;  // the registers of vector operands; the targets of an indexed branch
  int line = 0;           // in the PTX
  bool copies = false;    // a register or a constant to a register
  // Of the registers that some wgmma of the program uses, which are numbered: those that a wgmma uses, in the order of
  // ``list``; those that another instruction reads and writes.
  std::vector<int> uses, reads, writes;
};

// Who has to be ordered with whom: warps; the products of each, its bulk stores, which read and later write, and its
// loads from tensor memory; and the bulk loads of mbarriers.
constexpr int MMA = MAX_WARPS, STORE = 2 * MAX_WARPS, STORED = 3 * MAX_WARPS, LOAD = 4 * MAX_WARPS;
constexpr int BULK = 5 * MAX_WARPS;
constexpr int MAX_MBARRIERS = 64;
constexpr int AGENTS = BULK + MAX_MBARRIERS;

// A vector clock: up to which step of each agent something has happened before.
struct Clock {
  u32 at[AGENTS] = {};
  void join(const Clock& other) {
    for (int i = 0; i < AGENTS; ++i) at[i] = at[i] < other.at[i] ? other.at[i] : at[i];
  }
};

struct Counter {
  u64 executed = 0, lanes = 0, sectors = 0, ideal_sectors = 0, wavefronts = 0, ideal_wavefronts = 0;
};

struct Module {
  std::vector<Instruction> code;
  std::vector<u8> registers;  // of a warp that begins: constants and poison
  int watched = 0;            // registers that some wgmma uses
  std::vector<Counter> counters;
};

enum Use : u8 { READ, WRITE, ATOMIC };

// An access to some of four bytes of global memory.
struct GlobalAccess {
  u32 clock = 0, line = 0;
  u32 more = 0;  // Block::accesses has another one there, from 1
  u8 agent = 0;
  Use use = READ;
  u8 bytes = 0;  // a bit for each of the four
};
// What has been done to four bytes. Blocks come one after another, and nothing orders them: of all before the present
// one, it is enough to know which bytes they used, and how.
struct GlobalWord {
  u32 block = 0;        // of which the access tells; from 1
  GlobalAccess access;  // those that a later one does not stand for, and behind it the others
  u8 before[3] = {};    // per use: bytes
  u32 lines[3] = {};
  void settle(const GlobalAccess& a) {
    before[a.use] |= a.bytes;
    if (a.bytes) lines[a.use] = a.line;
  }
};

// Memory that the kernel may access: [low, high). ``valid`` has a byte for each: zeros lie between the rows of a view.
struct Region {
  u64 low, high;
  const u8* valid;
  std::vector<GlobalWord> words;
  std::vector<u8> read, written;         // sectors of 32 bytes: ever
  std::vector<u32> read_by, written_by;  // and by which block last
};

// Four bytes of shared memory, or one. Reads are kept apart, see Block::reads.
struct SharedWord {
  u32 block = 0;    // of whom the rest tells
  u32 parts = 0;    // where Block::words has the four bytes, once they are used one by one
  int writer = -1;  // agent
  u32 write_clock = 0, write_line = 0;
  u32 copies = 0;       // cp.async on their way
  u64 write_time = 0;   // to compare with fences
  bool atomic = false;  // the write was
};

// A column of 16 lanes of tensor memory: who wrote it last, and until which step who read it.
struct TensorColumn {
  int writer = -1;
  u32 write_clock = 0, write_line = 0;
  bool pending = false;                          // by a tcgen05.st that has not been waited for
  u32 reads[2 * MAX_WARPS] = {}, read_line = 0;  // by the loads of warps and by products
};

// A bulk copy: of a box of a tensor, whose map may lie at 0 as the first parameter; or of ``bytes`` to or from
// ``global``.
struct Bulk {
  bool tensor = false;
  u64 shared = 0, global = 0, map = 0;
  u32 bytes = 0;
  i32 corner[5] = {};
  const Instruction* instruction = nullptr;
};

struct AsyncCopy {
  u64 to, from;
  int size, filled;  // of ``size`` bytes, ``filled`` are copied and the others become 0
};

struct WarpMma {
  const Instruction* instruction;
  u64 a, b;  // matrix descriptors
  bool add;
};

struct TensorMma {  // tcgen05.mma
  bool a_in_shared, add, tf32;
  u64 a, b;
  u32 d, description;
};

struct Commit {  // tcgen05.commit: tells when the products before it are done
  size_t until;  // the first of Block::products after it
  int warp;
  u32 group;
};

struct Mbarrier {
  u32 count, pending;
  u64 phase = 0;
  i64 bytes = 0;  // of transactions that are expected
  int agent = 0;
  u64 made = 0;  // when, by which warp, and at which step of it
  int maker = 0;
  u32 step = 0;
  Clock arriving, done;
  std::vector<Bulk> loads;  // on their way
  std::vector<Commit> commits;
};

struct Launch;

struct Block {
  Launch* launch;
  u32 serial = 0;  // from 1
  int index[3];
  std::vector<u8> shared;
  std::vector<SharedWord> words;
  std::vector<u64> reads;  // per word and reading agent: clock << 32 | line
  std::vector<std::pair<GlobalWord*, GlobalAccess>> accesses;
  std::vector<u32> tensor;  // tensor memory: 128 lanes of 512 columns
  u32 tensor_columns = 0;
  std::vector<TensorColumn> columns;  // eight times 512
  std::vector<TensorMma> products;    // of tcgen05, in order
  size_t products_done = 0;
  std::map<u64, Mbarrier> mbarriers;
  std::map<int, std::pair<int, Clock>> arrived;  // at barriers by bar.arrive: warps, and what they had done
  std::vector<Warp> warps;
  u64 time = 1;
  bool progress = false;
};

struct Path {
  int next;
  u32 lanes;
};

struct Warp {
  u8* registers;
  Block* block;
  int id;
  u32 living;
  std::vector<Path> paths;  // where the lanes are, by ascending instruction
  bool at_barrier, done;
  int barrier, barrier_warps;  // 0: all
  const Instruction* instruction;
  Clock clock;
  // When this warp's last fence.proxy.async, fence.mbarrier_init and barrier were.
  u64 fenced, fenced_mbarriers, synchronised;
  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> copies;
  std::vector<WarpMma> open_products;
  std::vector<std::vector<WarpMma>> products;
  std::vector<Bulk> open_stores;
  std::vector<std::vector<Bulk>> stores;
  std::vector<std::pair<u32*, u32>> tensor_stores;  // by tcgen05.st: where, and what, when the program waits
  std::vector<TensorColumn*> stored_columns;
  u32 product_groups, store_groups;  // committed so far
  u32 tensor_loads;                  // tcgen05.wait::ld so far
  std::vector<u8> flying, unfenced;  // per watched register: accumulator 1, operand 2; written since wgmma.fence
};

enum Flags : u32 { CHECKS = 1, COUNTERS = 2 };

struct Launch {
  Module* module;
  int grid[3], threads[3];
  u32 flags, schedule;  // schedule: 0 warps in order, 1 reversed, else the seed of a random order
  const u8* parameters;
  u64 parameter_bytes, shared_bytes;
  std::vector<Region> regions;
  Region* last = nullptr;
  std::map<std::string, u64> races;  // text -> how often
  u64 executed = 0, macs = 0, block_reads = 0, block_writes = 0;
  bool checks() const { return flags & CHECKS; }
  bool counts() const { return flags & COUNTERS; }
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn, gnu::format(printf, 2, 3)]] void fault(const Warp& w, const char* format, ...);

using Table = std::map<std::string, void (*)(Warp&, const Instruction&, u32)>;
const Table& instructions();
void add_arithmetic(Table&);
void add_collectives(Table&);
void add_memory(Table&);
void add_copies(Table&);
void add_matrices(Table&);
void add_tensor_maps(Table&);
void add_tensor_memory(Table&);

template <class T>
inline T* operand(Warp& w, const Instruction& i, int k) {
  return reinterpret_cast<T*>(w.registers + i.at[k]);
}
template <class T>
inline T* at_offset(Warp& w, int offset) {
  return reinterpret_cast<T*>(w.registers + offset);
}
inline int first_lane(u32 lanes) { return __builtin_ctz(lanes); }
// for (int lane : each(lanes))
struct each {
  u32 lanes;
  struct iterator {
    u32 left;
    int operator*() const { return __builtin_ctz(left); }
    void operator++() { left &= left - 1; }
    bool operator!=(const iterator& other) const { return left != other.left; }
  };
  explicit each(u32 l) : lanes(l) {}
  iterator begin() const { return {lanes}; }
  iterator end() const { return {0}; }
};
inline void set_predicate(u32* p, u32 lanes, u32 value) { *p = (*p & ~lanes) | (value & lanes); }

// ---- memory.cpp: addresses
u8* global_memory(Warp& w, u64 address, int bytes, bool write);
u8* shared_memory(Warp& w, u64 address, int bytes, bool write);

// ---- checks.cpp
struct Access {
  u64 address;
  int bytes;
  Use use;
  int agent;  // who, at which step of its own
  u32 clock;
  bool async = false;           // through the async proxy
  const void* value = nullptr;  // what is written: the same bytes written twice are no race
};
void check_shared(Warp& w, const Access& access);
void check_global(Warp& w, const Access& access);
// By the warp itself, in the generic proxy.
inline Access own(const Warp& w, u64 address, int bytes, Use use, const void* value = nullptr) {
  return {address, bytes, use, w.id, w.clock.at[w.id], false, value};
}
void check_tensor_memory(Warp& w, u32 lane, u32 column, bool write, int agent, u32 clock);
void check_registers(Warp& w, const Instruction& i);
[[gnu::format(printf, 2, 3)]] void race(Warp& w, const char* format, ...);
void release(Warp& w, Clock& to);
void count_global(Warp& w, const Instruction& i, const u64* address, u32 lanes, int bytes, bool write);
void count_shared(Warp& w, const Instruction& i, const u64* address, u32 lanes, int bytes);

// ---- copies.cpp
Mbarrier& mbarrier(Warp& w, u64 address);
bool wait_mbarrier(Warp& w, const Instruction& i, u32 lanes);
inline u32 swizzled(u32 address, int bytes) {
  return bytes ? address ^ ((address >> 7 & (bytes / 16 - 1)) << 4) : address;
}

// ---- tensor_memory.cpp
void finish_products(Warp& w, size_t until);

}  // namespace emulator
