// Asynchronous copies: cp.async, bulk copies by TMA, and the mbarriers that tell of them. Until a program has waited,
// what is copied is poison.
#include <algorithm>

#include "machine.h"

namespace emulator {

Mbarrier& mbarrier(Warp& w, u64 address) {
  shared_memory(w, address, 8, false);
  if (w.block->launch->checks()) check_shared(w, own(w, address, 8, READ));
  auto found = w.block->mbarriers.find(address);
  if (found == w.block->mbarriers.end()) fault(w, "there is no mbarrier at %llu", (unsigned long long)address);
  return found->second;
}

namespace {

u64 shared_address(Warp& w, const Instruction& i, int k, int lane) {
  return (u32)(operand<u32>(w, i, k)[lane] + i.imm[k]);
}

// ---- cp.async. at: destination, source, bytes that are copied or -1; imm: offsets, bytes
void copy(Warp& w, const Instruction& i, u32 lanes) {
  Launch& launch = *w.block->launch;
  u64 to[LANES], from[LANES];
  u32 reading = 0;
  const int size = i.imm[2];
  for (int lane : each(lanes)) {
    to[lane] = shared_address(w, i, 0, lane);
    from[lane] = operand<u64>(w, i, 1)[lane] + i.imm[1];
    int filled = i.at[2] < 0 ? size : std::min<u32>(size, operand<u32>(w, i, 2)[lane]);
    u8* place = shared_memory(w, to[lane], size, true);
    if (filled) {
      if (from[lane] % size) fault(w, "cp.async from %llx, which is misaligned", (unsigned long long)from[lane]);
      global_memory(w, from[lane], filled, false);
      reading |= 1u << lane;
    }
    if (launch.checks()) {
      if (filled) check_global(w, own(w, from[lane], filled, READ));
      check_shared(w, own(w, to[lane], size, WRITE));
      for (u64 word = to[lane] / 4; word < (to[lane] + size) / 4; ++word) ++w.block->words[word].copies;
    }
    memset(place, 0xff, size);
    w.open_copies.push_back({to[lane], from[lane], size, filled});
  }
  if (launch.counts()) {
    if (reading) count_global(w, i, from, reading, size, false);
    count_shared(w, i, to, lanes, size);
  }
}

void commit_copies(Warp& w, const Instruction&, u32) {
  w.copies.push_back(std::move(w.open_copies));
  w.open_copies.clear();
}

void wait_for_copies(Warp& w, size_t left) {
  while (w.copies.size() > left) {
    for (const AsyncCopy& c : w.copies.front()) {
      u8* place = w.block->shared.data() + c.to;
      memcpy(place, (const void*)c.from, c.filled);
      memset(place + c.filled, 0, c.size - c.filled);
      if (!w.block->launch->checks()) continue;
      for (u64 word = c.to / 4; word < (c.to + c.size) / 4; ++word) --w.block->words[word].copies;
      check_shared(w, own(w, c.to, c.size, WRITE));
    }
    w.copies.erase(w.copies.begin());
  }
}

// ---- mbarriers. at[0]: address; imm[0]: offset
void complete(Warp& w, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  ++b.phase;
  b.arriving.at[BULK + b.agent] = (u32)b.phase;
  b.done = b.arriving;
  w.block->progress = true;
}

void arrive(Warp& w, Mbarrier& b, u32 count) {
  if (b.pending < count) fault(w, "mbarrier: %u arrive where %u are still awaited", count, b.pending);
  release(w, b.arriving);
  b.pending -= count;
  bool alone = b.count == count && !b.bytes;  // then it knows that the phase is over
  complete(w, b);
  if (alone) w.clock.at[BULK + b.agent] = (u32)b.phase;
}

// at[1]: arrivals
void init_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  Block& block = *w.block;
  int lane = first_lane(lanes);
  u64 address = shared_address(w, i, 0, lane);
  shared_memory(w, address, 8, true);
  if (block.launch->checks()) check_shared(w, own(w, address, 8, WRITE));
  Mbarrier b{};
  b.count = b.pending = operand<u32>(w, i, 1)[lane];
  auto before = block.mbarriers.find(address);
  b.agent = before == block.mbarriers.end() ? (int)block.mbarriers.size() : before->second.agent;
  if (b.agent >= MAX_MBARRIERS) fault(w, "more than %d mbarriers", MAX_MBARRIERS);
  if (before != block.mbarriers.end()) b.phase = before->second.phase;  // of the agent's clock, which cannot go back
  b.phase += b.phase & 1;
  b.arriving.at[BULK + b.agent] = (u32)b.phase;
  b.made = ++block.time, b.maker = w.id, b.step = w.clock.at[w.id];
  w.clock.at[BULK + b.agent] = (u32)b.phase;
  block.mbarriers[address] = b;
}

void invalidate_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  const u64 address = shared_address(w, i, 0, first_lane(lanes));
  const Mbarrier& b = mbarrier(w, address);
  if (w.block->launch->checks()) check_shared(w, own(w, address, 8, WRITE));
  // Products are done in order: who has waited for later ones need not wait for these.
  const bool done = b.commits.empty() || b.commits.back().until <= w.block->products_done;
  if (!b.loads.empty() || !done) fault(w, "mbarrier.inval while something is on its way");
}

// at[1]: arrivals or -1: one; at[2]: bytes that are expected, or -1
void arrive_at_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  for (int lane : each(lanes)) {
    Mbarrier& b = mbarrier(w, shared_address(w, i, 0, lane));
    if (i.at[2] >= 0) b.bytes += operand<u32>(w, i, 2)[lane];
    arrive(w, b, i.at[1] < 0 ? 1 : operand<u32>(w, i, 1)[lane]);
  }
}

// at[1]: bytes
void expect_bytes(Warp& w, const Instruction& i, u32 lanes) {
  for (int lane : each(lanes)) mbarrier(w, shared_address(w, i, 0, lane)).bytes += operand<u32>(w, i, 1)[lane];
}

// ---- bulk copies
TensorMap map_at(Warp& w, u64 address) {
  const Launch& launch = *w.block->launch;
  TensorMap map;
  // A map that is a kernel's parameter has its offset among them for an address.
  const u8* from = address + sizeof map <= launch.parameter_bytes ? launch.parameters + address
                                                                  : global_memory(w, address, sizeof map, false);
  memcpy(&map, from, sizeof map);
  if (map.magic != TENSOR_MAP) fault(w, "there is no tensor map at %llx", (unsigned long long)address);
  return map;
}

// f(shared address, global address or 0 where there is none, bytes, skipped) for each 16 bytes. Of those at the shared
// address, ``skipped`` lie before the tensor.
template <class F>
void pieces(Warp& w, const Bulk& bulk, F f) {
  if (!bulk.tensor) {
    for (u32 offset = 0; offset < bulk.bytes; offset += 16) f(bulk.shared + offset, bulk.global + offset, 16, 0);
    return;
  }
  const TensorMap map = map_at(w, bulk.map);
  const int row = map.box[0] * map.element;
  u64 rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (u64 r = 0; r < rows; ++r) {
    u64 left = r, global = map.base;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      i64 at = bulk.corner[d] + (i64)(left % map.box[d]);
      left /= map.box[d];
      inside = inside && at >= 0 && at < (i64)map.size[d];
      global += at * map.stride[d - 1];
    }
    for (int offset = 0; offset < row; offset += 16) {
      const i64 x = bulk.corner[0] + offset / map.element;
      const i64 first = std::max<i64>(0, -x), last = std::min<i64>(16 / map.element, (i64)map.size[0] - x);
      const u64 shared = swizzled(bulk.shared + r * row + offset, map.swizzle);
      if (inside && first < last) {
        f(shared, global + (x + first) * map.element, (int)(last - first) * map.element, (int)first * map.element);
      } else {
        f(shared, 0, 16, 0);
      }
    }
  }
}

i64 bytes_of(Warp& w, const Bulk& bulk) {
  i64 bytes = 0;
  pieces(w, bulk, [&](u64, u64, int, int) { bytes += 16; });
  return bytes;
}

// at: shared address, global address or map, mbarrier (loads) or -1, bytes (without a map) or -1; list: coordinates;
// imm: offsets of the first three
Bulk bulk_of(Warp& w, const Instruction& i, int lane) {
  const Launch& launch = *w.block->launch;
  Bulk bulk;
  bulk.instruction = &i;
  bulk.shared = shared_address(w, i, 0, lane);
  u64 other = operand<u64>(w, i, 1)[lane] + i.imm[1];
  if (i.list.empty()) {
    bulk.global = other, bulk.bytes = operand<u32>(w, i, 3)[lane];
    if (bulk.bytes % 16 || other % 16) fault(w, "bulk copy of %u bytes, misaligned", bulk.bytes);
  } else {
    bulk.tensor = true, bulk.map = other;
    if (map_at(w, other).rank != (int)i.list.size()) fault(w, "the tensor map has another number of dimensions");
    if (launch.checks() && other >= launch.parameter_bytes) check_global(w, own(w, other, sizeof(TensorMap), READ));
    for (size_t d = 0; d < i.list.size(); ++d) bulk.corner[d] = at_offset<i32>(w, i.list[d])[lane];
  }
  if (bulk.shared % (bulk.tensor ? 128 : 16)) fault(w, "bulk copy at a misaligned shared address");
  return bulk;
}

void count_bulk(Warp& w, const Bulk& bulk, bool write) {
  pieces(w, bulk, [&](u64, u64 global, int bytes, int) {
    if (global) count_global(w, *bulk.instruction, &global, 1, bytes, write);
  });
}

// The manual asks for a fence in either case. Hardware is known to do with a barrier, which is all that Triton emits.
bool knows_of_init(const Warp& w, const Mbarrier& b) {
  if (b.maker != w.id) return w.clock.at[b.maker] >= b.step;
  return std::max({w.fenced, w.fenced_mbarriers, w.synchronised}) > b.made;
}

void bulk_load(Warp& w, const Instruction& i, u32 lanes) {
  Block& block = *w.block;
  for (int lane : each(lanes)) {
    Bulk bulk = bulk_of(w, i, lane);
    Mbarrier& b = mbarrier(w, shared_address(w, i, 2, lane));
    const bool checks = block.launch->checks();
    if (checks && !knows_of_init(w, b))
      race(w, "bulk load with an mbarrier that is not ordered after its mbarrier.init");
    if (block.launch->counts()) count_bulk(w, bulk, false);
    pieces(w, bulk, [&](u64 shared, u64 global, int bytes, int) {
      u8* place = shared_memory(w, shared, 16, true);
      if (global) global_memory(w, global, bytes, false);
      if (checks) {
        if (global) check_global(w, {global, bytes, READ, BULK + b.agent, (u32)b.phase + 1});
        check_shared(w, {shared, 16, WRITE, BULK + b.agent, (u32)b.phase + 1, true});
      }
      memset(place, 0xff, 16);
    });
    b.loads.push_back(bulk);
  }
}

// The loads and products that an mbarrier waits for happen when nothing else is missing, and somebody asks.
void land(Warp& w, Mbarrier& b) {
  if (b.pending != b.commits.size() || (b.loads.empty() && b.commits.empty())) return;
  for (const Bulk& bulk : b.loads) {
    pieces(w, bulk, [&](u64 shared, u64 global, int bytes, int skipped) {
      u8* place = w.block->shared.data() + shared;
      memset(place, 0, 16);
      if (global) memcpy(place + skipped, (const void*)global, bytes);
    });
    b.bytes -= bytes_of(w, bulk);
  }
  b.loads.clear();
  for (const Commit& commit : b.commits) {
    finish_products(w, commit.until);
    u32& known = b.arriving.at[MMA + commit.warp];
    known = std::max(known, commit.group);
    --b.pending;
  }
  b.commits.clear();
  complete(w, b);
}

void bulk_store(Warp& w, const Instruction& i, u32 lanes) {
  Block& block = *w.block;
  for (int lane : each(lanes)) {
    Bulk bulk = bulk_of(w, i, lane);
    if (block.launch->counts()) count_bulk(w, bulk, true);
    pieces(w, bulk, [&](u64 shared, u64 global, int bytes, int) {
      shared_memory(w, shared, 16, false);
      if (global) global_memory(w, global, bytes, true);
      if (!block.launch->checks()) return;
      if (global) check_global(w, {global, bytes, WRITE, STORED + w.id, w.store_groups + 1});
      check_shared(w, {shared, 16, READ, STORE + w.id, w.store_groups + 1, true});
    });
    w.open_stores.push_back(bulk);
  }
}

void commit_stores(Warp& w, const Instruction&, u32) {
  w.stores.push_back(std::move(w.open_stores));
  w.open_stores.clear();
  ++w.store_groups;
}

// imm: groups that may be left, whether it waits for the reads alone
void wait_for_stores(Warp& w, const Instruction& i, u32) {
  const size_t left = i.imm[0];
  while (w.stores.size() > left) {
    for (const Bulk& bulk : w.stores.front()) {
      pieces(w, bulk, [&](u64 shared, u64 global, int bytes, int skipped) {
        if (global) memcpy((void*)global, w.block->shared.data() + shared + skipped, bytes);
      });
    }
    w.stores.erase(w.stores.begin());
  }
  for (int agent : {STORE, STORED}) {
    if (w.store_groups <= left || (agent == STORED && i.imm[1])) continue;
    u32& known = w.clock.at[agent + w.id];
    known = std::max<u32>(known, w.store_groups - left);
  }
}

}  // namespace

// at: predicate, address, parity; imm[0]: offset. The predicate is true where the phase of this parity is over.
bool wait_mbarrier(Warp& w, const Instruction& i, u32 lanes) {
  int lane = first_lane(lanes);
  Mbarrier& b = mbarrier(w, (u32)(operand<u32>(w, i, 1)[lane] + i.imm[0]));
  const u32 parity = operand<u32>(w, i, 2)[lane] & 1;
  if ((b.phase & 1) == parity) land(w, b);
  const bool over = (b.phase & 1) != parity;
  if (over && w.block->launch->checks() && b.phase >= 2 && w.clock.at[BULK + b.agent] + 2 <= b.phase) {
    race(w, "wait for an mbarrier that is two phases ahead: the parity may be that of another phase");
  }
  if (over) w.clock.join(b.done);
  set_predicate(operand<u32>(w, i, 0), lanes, over ? ALL : 0);
  return over;
}

void add_copies(Table& t) {
  t["cp.async"] = copy;
  t["cp.async.commit"] = commit_copies;
  t["cp.async.wait"] = [](Warp& w, const Instruction& i, u32) { wait_for_copies(w, i.imm[0]); };
  t["cp.async.wait_all"] = [](Warp& w, const Instruction& i, u32 lanes) {
    commit_copies(w, i, lanes);
    wait_for_copies(w, 0);
  };
  t["fence.proxy.async"] = [](Warp& w, const Instruction&, u32) { w.fenced = ++w.block->time; };
  t["fence.mbarrier_init"] = [](Warp& w, const Instruction&, u32) { w.fenced_mbarriers = ++w.block->time; };
  t["mbarrier.init"] = init_mbarrier;
  t["mbarrier.inval"] = invalidate_mbarrier;
  t["mbarrier.arrive"] = arrive_at_mbarrier;
  t["mbarrier.expect"] = expect_bytes;
  t["bulk.load"] = bulk_load;
  t["bulk.store"] = bulk_store;
  t["bulk.commit"] = commit_stores;
  t["bulk.wait"] = wait_for_stores;
}

}  // namespace emulator
