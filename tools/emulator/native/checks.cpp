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
  const char* kinds[] = {"warp ", "a matrix product of warp ", "a bulk store of warp ", "a bulk store of warp ",
                         "a tcgen05.ld of warp "};
  if (agent >= BULK) return "a bulk load of mbarrier " + std::to_string(agent - BULK);
  return kinds[agent / MAX_WARPS] + std::to_string(agent % MAX_WARPS);
}

// The index of an agent among those that read.
size_t reader(const Block& block, int agent) { return agent / MAX_WARPS * block.warps.size() + agent % MAX_WARPS; }

size_t readers(const Block& block) { return 3 * block.warps.size(); }

SharedWord& word_at(Block& block, u64 index) {
  SharedWord& word = block.words[index];
  if (word.block != block.serial) {  // the first access of this block
    word = SharedWord();
    word.block = block.serial;
    std::fill_n(block.reads.begin() + index * readers(block), readers(block), 0);
  }
  return word;
}

// From now on, each of the four bytes has a word of its own. Returns where.
u64 split(Block& block, u64 index) {
  const size_t first = block.words.size(), count = readers(block);
  block.words[index].parts = first;
  block.words.resize(first + 4, block.words[index]);
  block.reads.resize((first + 4) * count);
  for (size_t part = first; part < first + 4; ++part) {
    std::copy_n(block.reads.begin() + index * count, count, block.reads.begin() + part * count);
  }
  return first;
}

// Whether a write comes after all reads of a word.
[[gnu::always_inline]] inline void check_readers(Warp& w, const Access& a, const u64* reads) {
  const size_t warps = w.block->warps.size();
  for (int kind = 0; kind < 3; ++kind) {
    for (size_t warp = 0; warp < warps; ++warp) {
      const int other = kind * MAX_WARPS + warp;
      const u64 read = reads[kind * warps + warp];
      if ((read >> 32) <= w.clock.at[other] || other == a.agent) continue;
      race(w, "write to shared memory, not ordered after the read of %s [line %u]", name_of(other).c_str(), (u32)read);
    }
  }
}

// A word, or one of the bytes that it was split into; ``same``: what is written is there already.
[[gnu::always_inline]] inline void check_word(Warp& w, const Access& a, SharedWord& word, u64* reads, bool same) {
  Block& block = *w.block;
  const bool unordered = word.writer >= 0 && word.writer != a.agent && word.write_clock > w.clock.at[word.writer];
  if (unordered && !same && !(a.use == ATOMIC && word.atomic)) {
    race(w, "%s shared memory, not ordered after the write of %s [line %u]", a.use == READ ? "read of" : "write to",
         name_of(word.writer).c_str(), word.write_line);
  }
  if (a.use != READ) {
    if (!same) check_readers(w, a, reads);
    if (!same || word.writer < 0) {
      word.writer = a.agent, word.write_clock = a.clock, word.write_line = w.instruction->line;
      word.write_time = block.time, word.atomic = a.use == ATOMIC;
    }
    return;
  }
  if (word.writer < 0) race(w, "read of shared memory that nobody has written");
  reads[reader(block, a.agent)] = (u64)a.clock << 32 | (u32)w.instruction->line;
  if (a.async && word.writer >= 0 && word.writer < MAX_WARPS && w.fenced <= word.write_time &&
      block.warps[word.writer].fenced <= word.write_time) {
    race(w, "the async proxy reads what %s has written [line %u] without a fence.proxy.async since",
         name_of(word.writer).c_str(), word.write_line);
  }
}

// Of two uses of the same bytes, these do not depend on the order.
bool commute(Use a, Use b) { return a == b && a != WRITE; }

// Of four bytes that the mask names; ``same``: what is written is there already.
void check_word(Warp& w, const Access& a, GlobalWord& word, u8 mask, bool same) {
  Block& block = *w.block;
  auto report = [&](Use use, const std::string& who, u32 line) {
    race(w, "%s global memory, not ordered after a %s by %s [line %u]",
         a.use == ATOMIC  ? "atomic on"
         : a.use == WRITE ? "write to"
                          : "read of",
         use == READ ? "read" : "write", who.c_str(), line);
  };
  if (word.block != block.serial) {
    word.settle(word.access);
    word.access = GlobalAccess();
    word.block = block.serial;
  }
  for (Use use : {READ, WRITE, ATOMIC}) {
    if ((word.before[use] & mask) && !commute(use, a.use)) report(use, "another block", word.lines[use]);
  }
  auto next = [&](GlobalAccess* e) { return e->more ? &block.accesses[e->more - 1].second : nullptr; };
  bool twice = false;  // the same number by two warps of a block is no race
  for (GlobalAccess* e = &word.access; same && e; e = next(e)) twice = twice || (e->use == WRITE && (e->bytes & mask));
  GlobalAccess *place = nullptr, *last = nullptr;
  for (GlobalAccess* e = &word.access; e; last = e, e = next(e)) {
    const bool ordered = e->agent == a.agent || e->clock <= w.clock.at[e->agent];
    if ((e->bytes & mask) && !ordered && !commute(e->use, a.use) && !twice) {
      report(e->use, e->agent < MAX_WARPS ? "another warp" : name_of(e->agent), e->line);
    }
    // Whatever is ordered after the new access is then ordered after this one, too.
    const bool covered = ordered && !(e->bytes & ~mask) && (a.use == WRITE || a.use == e->use);
    if (covered) e->bytes = 0;
    if (!e->bytes && !place) place = e;
  }
  if (!place) {
    last->more = block.accesses.size() + 1;
    place = &block.accesses.emplace_back(&word, GlobalAccess()).second;
  }
  *place = {a.clock, (u32)w.instruction->line, place->more, (u8)a.agent, a.use, mask};
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

void check_shared(Warp& w, const Access& a) {
  Block& block = *w.block;
  ++block.time;
  const bool same = a.value && !memcmp(a.value, block.shared.data() + a.address, a.bytes);
  const size_t count = readers(block), own = a.use == READ ? reader(block, a.agent) : 0;
  for (u64 index = a.address / 4; index < (a.address + a.bytes + 3) / 4; ++index) {
    SharedWord& word = word_at(block, index);
    u64* reads = &block.reads[index * count];
    // What the agent has read in this very step was checked then, and a write since would be a race of the writer's.
    if (a.use == READ && (reads[own] >> 32) == a.clock) continue;
    if (word.copies) {
      race(w, "%s shared memory that a cp.async is still writing", a.use == READ ? "read of" : "write to");
    }
    if (a.bytes >= 4 && !word.parts) {
      check_word(w, a, word, reads, same);
      continue;
    }
    const u64 parts = word.parts ? word.parts : split(block, index), first = a.bytes < 4 ? a.address % 4 : 0;
    for (u64 part = parts + first; part < parts + first + std::min(a.bytes, 4); ++part) {
      check_word(w, a, block.words[part], &block.reads[part * count], same);
    }
  }
}

void check_global(Warp& w, const Access& a) {
  Region& region = *w.block->launch->last;
  if (region.words.empty()) region.words.resize((region.high - (region.low & ~3ull) + 7) / 4);
  const bool same = a.value && !memcmp(a.value, (const void*)a.address, a.bytes);
  const u64 first = a.address - (region.low & ~3ull), last = first + a.bytes - 1;
  for (u64 index = first / 4; index <= last / 4; ++index) {
    const int from = std::max(first, 4 * index) - 4 * index, to = std::min(last, 4 * index + 3) - 4 * index;
    check_word(w, a, region.words[index], (2u << to) - (1u << from), same);
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
    c.reads[agent % LOAD] = clock, c.read_line = w.instruction->line;
    return;
  }
  for (int k = 0; k < 2 * MAX_WARPS; ++k) {
    const int other = k < MAX_WARPS ? LOAD + k : k;
    if (other == agent || c.reads[k] <= w.clock.at[other]) continue;
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
