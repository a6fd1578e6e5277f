// What a program may not do although it often goes well: races, missing fences, registers of a product in flight. And
// the counters of what memory does for an access.
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "machine.h"

namespace emulator {
namespace {

std::string text_of(const char* format, va_list arguments) {
  char text[400];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

std::string name_of(int agent) {
  const char* kinds[] = {"warp ", "a matrix product of warp ", "a bulk store of warp "};
  if (agent >= BULK) return "a bulk load of mbarrier " + std::to_string(agent - BULK);
  return kinds[agent / MAX_WARPS] + std::to_string(agent % MAX_WARPS);
}

// The index of an agent among those that read.
size_t reader(const Block& block, int agent) { return agent / MAX_WARPS * block.warps.size() + agent % MAX_WARPS; }

SharedWord& word_at(Block& block, u64 index) {
  SharedWord& word = block.words[index];
  if (word.block != block.serial) {  // the first access of this block
    word = SharedWord();
    word.block = block.serial;
    size_t readers = 3 * block.warps.size();
    std::fill_n(block.reads.begin() + index * readers, readers, 0);
  }
  return word;
}

// Whether a write comes after all reads of a word.
void check_readers(Warp& w, const SharedAccess& a, const Clock& known, const u64* reads, bool same) {
  if (same) return;
  const size_t warps = w.block->warps.size();
  for (int kind = 0; kind < 3; ++kind) {
    for (size_t warp = 0; warp < warps; ++warp) {
      const int other = kind * MAX_WARPS + warp;
      const u64 read = reads[kind * warps + warp];
      if ((read >> 32) <= known.at[other] || other == a.agent) continue;
      race(w, "write to shared memory, not ordered after the read of %s [line %u]", name_of(other).c_str(), (u32)read);
    }
  }
}

}  // namespace

void fault(const Warp& w, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = text_of(format, arguments);
  va_end(arguments);
  char where[160];
  snprintf(where, sizeof where, " [line %d] (block %d,%d,%d warp %d)", w.instruction ? w.instruction->line : 0,
           w.block->index[0], w.block->index[1], w.block->index[2], w.id);
  throw Fault(text + where);
}

// "[line N]" is the PTX line; the Python side adds the source line. The rest is the same for all blocks and warps.
void race(Warp& w, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = text_of(format, arguments);
  va_end(arguments);
  auto& races = w.block->launch->races;
  std::string key = text + " [line " + std::to_string(w.instruction->line) + "]";
  if (races.size() < 50 || races.count(key)) ++races[key];
}

void release(Warp& w, Clock& to) {
  to.join(w.clock);
  ++w.clock.at[w.id];
}

void check_shared(Warp& w, const SharedAccess& a, const Clock& known) {
  Block& block = *w.block;
  ++block.time;
  const size_t readers = 3 * block.warps.size(), own = a.write ? 0 : reader(block, a.agent);
  const bool same = a.value && !memcmp(a.value, block.shared.data() + a.address, a.bytes);
  for (u64 index = a.address / 4; index < (a.address + a.bytes + 3) / 4; ++index) {
    SharedWord& word = word_at(block, index);
    u64* reads = &block.reads[index * readers];
    // What the agent has read in this very step was checked then, and a write since would be a race of the writer's.
    if (!a.write && (reads[own] >> 32) == a.clock) continue;
    const bool unordered = word.writer >= 0 && word.writer != a.agent && word.write_clock > known.at[word.writer];
    if (word.copies || (unordered && !same && !(a.atomic && word.atomic))) {
      const char* what = a.write ? "write to" : "read of";
      if (word.copies) {
        race(w, "%s shared memory that a cp.async is still writing", what);
      } else {
        race(w, "%s shared memory, not ordered after the write of %s [line %u]", what, name_of(word.writer).c_str(),
             word.write_line);
      }
    }
    if (a.write) {
      check_readers(w, a, known, reads, same);
      if (!same || word.writer < 0) {
        word.writer = a.agent, word.write_clock = a.clock, word.write_line = w.instruction->line;
        word.write_time = block.time, word.atomic = a.atomic;
      }
      continue;
    }
    if (word.writer < 0) race(w, "read of shared memory that nobody has written");
    reads[own] = (u64)a.clock << 32 | (u32)w.instruction->line;
    if (a.async && word.writer >= 0 && word.writer < MAX_WARPS && w.fenced <= word.write_time &&
        block.warps[word.writer].fenced <= word.write_time) {
      race(w, "the async proxy reads what %s has written [line %u] without a fence.proxy.async since",
           name_of(word.writer).c_str(), word.write_line);
    }
  }
}

void check_shared(Warp& w, u64 address, int bytes, bool write, const void* value) {
  check_shared(w, {address, bytes, write, w.id, w.clock.at[w.id], false, value}, w.clock);
}

void check_global(Warp& w, u64 address, int bytes, bool write, bool atomic, const void* value) {
  Block& block = *w.block;
  Region& region = *block.launch->last;
  if (region.words.empty()) region.words.resize((region.high - (region.low & ~3ull) + 7) / 4);
  const u32 self = block.serial, line = w.instruction->line;
  const bool same = value && !memcmp(value, (const void*)address, bytes);
  const char* what = atomic ? "atomic on" : write ? "write to" : "read of";
  const u64 first = address - (region.low & ~3ull), last = first + bytes - 1;
  for (u64 index = first / 4; index <= last / 4; ++index) {
    const u8 from = std::max(first, 4 * index) - 4 * index, to = std::min(last, 4 * index + 3) - 4 * index;
    const u8 mask = (2u << to) - (1u << from);
    auto ordered = [&](const Access& other) {
      if (!other.block || !(other.bytes & mask)) return true;
      if (other.block != self) return false;
      return (int)other.warp == w.id || other.clock <= w.clock.at[other.warp];
    };
    GlobalWord& word = region.words[index];
    bool twice = same && word.write.block == self;  // the same number by two warps of a block is no race
    if (!ordered(word.write) && !(atomic && word.atomic) && !twice) {
      race(w, "%s global memory, not ordered after a write by %s [line %u]", what,
           word.write.block == self ? "another warp" : "another block", word.write.line);
    }
    const Access now{self, (u32)w.id, w.clock.at[w.id], line, mask};
    auto record = [&](Access& before) {  // of accesses to different bytes, the last warp's
      const u8 own = before.block == now.block && before.warp == now.warp ? before.bytes : 0;
      before = now;
      before.bytes |= own;
    };
    if (!write) {
      bool several = word.read.block && word.read.block != self && (word.read.bytes & mask);
      record(word.read);
      if (several) word.read.block = SEVERAL;
      continue;
    }
    if (!ordered(word.read) && !twice) {
      race(w, "%s global memory, not ordered after a read by %s [line %u]", what,
           word.read.block == self ? "another warp" : "another block", word.read.line);
    }
    record(word.write);
    word.atomic = atomic;
  }
}

// Of the 16 lanes from ``lane`` on.
void check_tensor_memory(Warp& w, u32 lane, u32 column, bool write, int agent, u32 clock) {
  TensorColumn& c = w.block->columns[lane / 16 * 512 + column];
  const char* what = write ? "write to" : "read of";
  // Both halves of a warp may store to the same lanes, in one instruction.
  const bool now = c.writer == agent && c.write_clock == clock && c.write_line == (u32)w.instruction->line;
  if (c.writer >= 0 && !(write && now) && (c.pending || (c.writer != agent && c.write_clock > w.clock.at[c.writer]))) {
    race(w, "%s tensor memory, %s the write of %s [line %u]", what,
         c.pending ? "without a tcgen05.wait::st since" : "not ordered after", name_of(c.writer).c_str(), c.write_line);
  }
  if (!write) {
    if (c.writer < 0) race(w, "read of tensor memory that nobody has written");
    c.reads[agent] = clock, c.read_line = w.instruction->line;
    return;
  }
  for (int other = 0; other < 2 * MAX_WARPS; ++other) {
    if (other == agent || c.reads[other] <= w.clock.at[other]) continue;
    race(w, "write to tensor memory, not ordered after a read of %s [line %u]", name_of(other).c_str(), c.read_line);
  }
  c.writer = agent, c.write_clock = clock, c.write_line = w.instruction->line;
  c.pending = agent < MAX_WARPS;
}

void check_registers(Warp& w, const Instruction& i) {
  for (int k : i.reads) {
    if (w.flying[k] == 1) race(w, "read of an accumulator while its wgmma is in flight");
  }
  for (int k : i.writes) {
    if (w.flying[k]) race(w, "write to a register while a wgmma that uses it is in flight");
    // A copy is as its source, and a constant is free: Triton's compiler leaves both behind the fence, and ptxas moves
    // them or does without.
    w.unfenced[k] = !i.copies || (!i.reads.empty() && w.unfenced[i.reads[0]]);
  }
}

void count_global(Warp& w, const Instruction& i, const u64* address, u32 lanes, int bytes, bool write) {
  Launch& launch = *w.block->launch;
  u64 sectors[2 * LANES], starts[LANES];
  int count = 0, distinct = 0;
  for (int lane : each(lanes)) {
    starts[distinct++] = address[lane];
    for (u64 s = address[lane] / 32; s <= (address[lane] + bytes - 1) / 32; ++s) sectors[count++] = s;
  }
  std::sort(sectors, sectors + count);
  count = std::unique(sectors, sectors + count) - sectors;
  std::sort(starts, starts + distinct);
  distinct = std::unique(starts, starts + distinct) - starts;
  Counter& counter = launch.module->counters[&i - launch.module->code.data()];
  counter.sectors += count;
  counter.ideal_sectors += (distinct * bytes + 31) / 32;
  for (int k = 0; k < count; ++k) {
    for (Region& region : launch.regions) {
      if (sectors[k] * 32 + 31 < region.low || sectors[k] * 32 >= region.high) continue;
      size_t index = sectors[k] - region.low / 32, size = region.high / 32 - region.low / 32 + 1;
      region.read.resize(size), region.written.resize(size), region.read_by.resize(size),
          region.written_by.resize(size);
      (write ? region.written : region.read)[index] = 1;
      u32& last = (write ? region.written_by : region.read_by)[index];
      if (last != w.block->serial) ++(write ? launch.block_writes : launch.block_reads);
      last = w.block->serial;
      break;
    }
  }
}

// Shared memory has 32 banks of 4 bytes; accesses of 8 and 16 bytes go by halves and quarters of a warp.
void count_shared(Warp& w, const Instruction& i, const u64* address, u32 lanes, int bytes) {
  Launch& launch = *w.block->launch;
  Counter& counter = launch.module->counters[&i - launch.module->code.data()];
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < LANES; first += together) {
    u32 some = lanes & (together == 32 ? ALL : ((1u << together) - 1) << first);
    if (!some) continue;
    u32 words[32][32];
    int in_bank[32] = {}, most = 1, distinct = 0;
    for (int lane : each(some)) {
      for (int offset = 0; offset < std::max(bytes, 4); offset += 4) {
        u32 word = (address[lane] + offset) / 4, bank = word % 32;
        if (std::find(words[bank], words[bank] + in_bank[bank], word) != words[bank] + in_bank[bank]) continue;
        words[bank][in_bank[bank]++] = word;
        most = std::max(most, in_bank[bank]);
        ++distinct;
      }
    }
    counter.wavefronts += most;
    counter.ideal_wavefronts += (distinct + 31) / 32;
  }
}

}  // namespace emulator
