// Warps, blocks and launches: who runs when, and the C functions that machine.py calls.
#include <algorithm>
#include <cstdio>
#include <random>

#include "machine.h"
#include "numbers.h"

namespace emulator {
namespace {

// ---- instructions in which lanes work together
enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// at: result, predicate or -1, value, two numbers
template <Shuffle how>
void shuffle(Warp& w, const Instruction& i, u32 lanes) {
  // The result may be in the register of any of them.
  u32 value[LANES], distance[LANES], bounds[LANES], found = 0;
  memcpy(value, operand<u32>(w, i, 2), sizeof value);
  memcpy(distance, operand<u32>(w, i, 3), sizeof distance);
  memcpy(bounds, operand<u32>(w, i, 4), sizeof bounds);
  for (int lane : each(lanes)) {
    const int by = distance[lane] & 31, clamp = bounds[lane] & 31, segment = bounds[lane] >> 8 & 31;
    const int low = lane & segment, high = low | (clamp & ~segment);
    int from = how == UP ? lane - by : how == DOWN ? lane + by : how == BUTTERFLY ? lane ^ by : low | (by & ~segment);
    const bool inside = how == UP ? from >= high : from <= high;
    if (!inside) from = lane;
    if (!(lanes >> from & 1)) fault(w, "shfl from lane %d, which does not take part", from);
    operand<u32>(w, i, 0)[lane] = value[from];
    found |= (u32)inside << lane;
  }
  if (i.at[1] >= 0) set_predicate(operand<u32>(w, i, 1), lanes, found);
}

template <class T, class F>
void add_reduction(Table& t, const std::string& name, F) {
  t["redux." + name] = [](Warp& w, const Instruction& i, u32 lanes) {
    const T* value = operand<T>(w, i, 1);
    T total = value[first_lane(lanes)];
    for (int lane : each(lanes & (lanes - 1))) total = F()(total, value[lane]);
    for (int lane : each(lanes)) operand<T>(w, i, 0)[lane] = total;
  };
}

// ---- which lanes are where
void settle(Warp& w) {  // the lanes that are furthest behind go first; those at one instruction go together
  auto& paths = w.paths;
  std::sort(paths.begin(), paths.end(), [](const Path& a, const Path& b) { return a.next < b.next; });
  size_t kept = 0;
  for (const Path& path : paths) {
    if (!path.lanes) continue;
    if (kept && paths[kept - 1].next == path.next) {
      paths[kept - 1].lanes |= path.lanes;
    } else {
      paths[kept++] = path;
    }
  }
  paths.resize(kept);
}

void branch(Warp& w, Path& path, const Instruction& i, u32 lanes) {
  path = {path.next + 1, path.lanes & ~lanes};
  if (i.kind == BRANCH) {
    w.paths.push_back({i.list[0], lanes});
    return;
  }
  for (int lane : each(lanes)) {
    const u32 label = operand<u32>(w, i, 0)[lane];
    if (label >= i.list.size()) fault(w, "branch to label %u of %zu", label, i.list.size());
    w.paths.push_back({i.list[label], 1u << lane});
  }
}

void end_warp(Warp& w) {
  w.done = true;
  w.block->progress = true;
  if (!w.stores.empty() || !w.open_stores.empty()) fault(w, "the warp ends before its bulk stores");
  for (const auto& group : w.products) {
    if (!group.empty()) fault(w, "the warp ends before its wgmma");
  }
  if (!w.open_products.empty()) fault(w, "the warp ends before its wgmma");
}

void run(Warp& w) {  // until it has to wait, or ends
  Launch& launch = *w.block->launch;
  const std::vector<Instruction>& code = launch.module->code;
  Counter* counters = launch.module->counters.data();
  const bool checks = launch.checks();
  const u64 limit = launch.executed + 4000000000ull;
  size_t which = 0;
  while (!w.paths.empty()) {
    Path& path = w.paths[which];
    if (path.next >= (int)code.size()) fault(w, "the program ends without an exit");
    const Instruction& i = code[path.next];
    w.instruction = &i;
    u32 lanes = path.lanes;
    if (i.guard >= 0) {
      u32 guard = *at_offset<u32>(w, i.guard);
      lanes &= i.negated ? ~guard : guard;
    }
    if (++launch.executed > limit) fault(w, "the program does not end");
    Counter& counter = counters[path.next];
    ++counter.executed;
    counter.lanes += __builtin_popcount(lanes);
    switch (i.kind) {
      case NORMAL:
        if (lanes) {
          if (checks) check_registers(w, i);
          i.run(w, i, lanes);
        }
        ++path.next;
        if (w.paths.size() == 1 || (which == 0 && path.next < w.paths[1].next)) continue;
        break;
      case BRANCH:
      case BRANCH_INDEXED:
        branch(w, path, i, lanes);
        break;
      case EXIT:
        w.living &= ~lanes;
        path.lanes &= ~lanes;
        ++path.next;
        break;
      case WAIT: {
        const bool over = !lanes || wait_mbarrier(w, i, lanes);
        ++path.next;
        settle(w);
        which = 0;
        if (!over) return;
        if (lanes) w.block->progress = true;
        continue;
      }
      case COLLECTIVE:
      case BARRIER:
        if (!lanes && path.lanes == w.living) {  // its guard is false for all
          ++path.next;
          break;
        }
        if (lanes != w.living) {  // the others have to come first
          if (which + 1 == w.paths.size()) fault(w, "lanes %08x of %08x come here, all have to", lanes, w.living);
          ++which;
          continue;
        }
        ++path.next;
        if (i.kind == COLLECTIVE) {
          if (checks) check_registers(w, i);
          i.run(w, i, lanes);
          break;
        }
        w.at_barrier = true;
        w.barrier = operand<u32>(w, i, 0)[first_lane(lanes)];
        w.barrier_warps = i.imm[0] / LANES;
        return;
    }
    settle(w);
    which = 0;
  }
  end_warp(w);
}

// ---- blocks
void start_warp(Block& block, int id, u8* registers) {
  Launch& launch = *block.launch;
  const Module& module = *launch.module;
  const int* size = launch.threads;
  Warp& w = block.warps[id];
  w = Warp();
  w.registers = registers;
  w.block = &block;
  w.id = id;
  const int left = size[0] * size[1] * size[2] - LANES * id;
  w.living = left >= LANES ? ALL : (1u << left) - 1;
  w.paths = {{0, w.living}};
  w.clock.at[id] = 1;
  w.flying.assign(module.watched, 0);
  w.unfenced.assign(module.watched, 1);
  memcpy(registers, module.registers.data(), module.registers.size());
  for (int lane = 0; lane < LANES; ++lane) {
    const int thread = LANES * id + lane;
    const int place[] = {thread % size[0], thread / size[0] % size[1], thread / size[0] / size[1]};
    u32* special = at_offset<u32>(w, 0) + lane;
    auto set = [&](int value) {  // in the order of SPECIAL in opcodes.py
      *special = value;
      special += LANES;
    };
    for (const int* three : {place, size, (const int*)block.index, (const int*)launch.grid}) {
      for (int axis = 0; axis < 3; ++axis) set(three[axis]);
    }
    set(lane);
    set(id);
  }
}

void start_block(Block& block, std::vector<u8>& registers) {
  ++block.serial;
  std::fill(block.shared.begin(), block.shared.end(), 0xff);
  std::fill(block.tensor.begin(), block.tensor.end(), ALL);
  block.tensor_columns = 0;
  std::fill(block.columns.begin(), block.columns.end(), TensorColumn());
  block.products.clear();
  block.products_done = 0;
  block.mbarriers.clear();
  block.arrived.clear();
  for (auto& [word, access] : block.accesses) word->settle(access);
  block.accesses.clear();
  block.time = 1;
  const size_t bytes = block.launch->module->registers.size();
  u8* aligned = (u8*)(((u64)registers.data() + 63) & ~63ull);
  for (size_t id = 0; id < block.warps.size(); ++id) start_warp(block, id, aligned + bytes * id);
}

// Opens every barrier at which all warps have come; tells whether there was one.
bool open_barriers(Block& block, int living) {
  std::map<int, std::vector<Warp*>> waiting;
  for (Warp& w : block.warps) {
    if (!w.done && w.at_barrier) waiting[w.barrier].push_back(&w);
  }
  bool opened = false;
  for (auto& [id, warps] : waiting) {
    auto& [early, clock] = block.arrived[id];
    const int wanted = warps[0]->barrier_warps ? warps[0]->barrier_warps : living;
    const int come = early + (int)warps.size();
    if (come < wanted) continue;
    if (come > wanted) fault(*warps[0], "barrier %d: %d warps come where %d are meant to", id, come, wanted);
    for (Warp* w : warps) release(*w, clock);
    for (Warp* w : warps) {
      const u32 own = w->clock.at[w->id];
      w->clock.join(clock);
      w->synchronised = ++block.time;
      w->clock.at[w->id] = own;
      w->at_barrier = false;
    }
    block.arrived.erase(id);
    opened = true;
  }
  return opened;
}

[[noreturn]] void report_deadlock(Block& block) {
  std::string text = "deadlock:";
  for (const Warp& w : block.warps) {
    if (w.done) continue;
    text +=
        " warp " + std::to_string(w.id) + (w.at_barrier ? " waits at barrier " + std::to_string(w.barrier) : " waits");
    text += " [line " + std::to_string(w.instruction->line) + "],";
  }
  for (const auto& [address, b] : block.mbarriers) {
    if (!b.pending && !b.bytes) continue;
    text += " mbarrier at " + std::to_string(address) + " awaits " + std::to_string(b.pending) + " arrivals and " +
            std::to_string(b.bytes) + " bytes in phase " + std::to_string(b.phase) + ",";
  }
  text.pop_back();
  throw Fault(text);
}

void run_block(Block& block, std::mt19937& random) {
  std::vector<int> order(block.warps.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  const u32 schedule = block.launch->schedule;
  if (schedule == 1) std::reverse(order.begin(), order.end());
  int idle = 0;
  for (;;) {
    if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
    block.progress = false;
    int living = 0;
    for (int id : order) {
      Warp& w = block.warps[id];
      if (!w.done && !w.at_barrier) run(w);
      living += !w.done;
    }
    if (!living && block.tensor_columns)
      fault(block.warps[0], "the block ends without having given back tensor memory");
    if (!living) return;
    const bool opened = open_barriers(block, living);
    idle = opened || block.progress ? 0 : idle + 1;
    if (idle > 3) report_deadlock(block);  // polling an mbarrier once more changes nothing
  }
}

void run_grid(Launch& launch) {
  const int threads = launch.threads[0] * launch.threads[1] * launch.threads[2];
  const int warps = (threads + LANES - 1) / LANES;
  if (warps > MAX_WARPS) throw Fault("more than 1024 threads in a block");
  std::vector<u8> registers(launch.module->registers.size() * warps + 64);
  std::mt19937 random(launch.schedule);
  Block block{};
  block.launch = &launch;
  block.warps.resize(warps);
  block.shared.resize(launch.shared_bytes + 16);
  for (const Instruction& i : launch.module->code) {
    if (i.run && i.run == instructions().at("tcgen05.alloc"))
      block.tensor.resize(128 * 512), block.columns.resize(8 * 512);
  }
  for (int z = 0; z < launch.grid[2]; ++z) {
    for (int y = 0; y < launch.grid[1]; ++y) {
      for (int x = 0; x < launch.grid[0]; ++x) {
        block.index[0] = x, block.index[1] = y, block.index[2] = z;
        if (launch.checks()) {
          block.words.resize(launch.shared_bytes / 4 + 8);
          block.reads.resize(block.words.size() * 3 * warps);
        }
        start_block(block, registers);
        run_block(block, random);
      }
    }
  }
}

}  // namespace

void add_collectives(Table& t) {
  t["trap"] = [](Warp& w, const Instruction&, u32) { fault(w, "trap"); };
  t["shfl.up"] = shuffle<UP>;
  t["shfl.down"] = shuffle<DOWN>;
  t["shfl.bfly"] = shuffle<BUTTERFLY>;
  t["shfl.idx"] = shuffle<INDEX>;
  add_reduction<i32>(t, "min.s32", [](i32 a, i32 b) { return std::min(a, b); });
  add_reduction<i32>(t, "max.s32", [](i32 a, i32 b) { return std::max(a, b); });
  add_reduction<u32>(t, "min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  add_reduction<u32>(t, "max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  add_reduction<u32>(t, "add", [](u32 a, u32 b) { return a + b; });
  add_reduction<u32>(t, "and", [](u32 a, u32 b) { return a & b; });
  add_reduction<u32>(t, "or", [](u32 a, u32 b) { return a | b; });
  add_reduction<u32>(t, "xor", [](u32 a, u32 b) { return a ^ b; });
  add_reduction<float>(t, "min.f32", [](float a, float b) { return least(a, b); });
  add_reduction<float>(t, "max.f32", [](float a, float b) { return greatest(a, b); });
  t["vote.ballot"] = [](Warp& w, const Instruction& i, u32 lanes) {
    const u32 result = *operand<u32>(w, i, 1) & lanes;
    for (int lane : each(lanes)) operand<u32>(w, i, 0)[lane] = result;
  };
  t["vote.any"] = [](Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(operand<u32>(w, i, 0), lanes, *operand<u32>(w, i, 1) & lanes ? ALL : 0);
  };
  t["vote.all"] = [](Warp& w, const Instruction& i, u32 lanes) {
    set_predicate(operand<u32>(w, i, 0), lanes, (*operand<u32>(w, i, 1) & lanes) == lanes ? ALL : 0);
  };
  // at: the lane that is elected or -1, the predicate that is true for it
  t["elect"] = [](Warp& w, const Instruction& i, u32 lanes) {
    const u32 first = first_lane(lanes);
    for (int lane : each(i.at[0] < 0 ? 0 : lanes)) operand<u32>(w, i, 0)[lane] = first;
    set_predicate(operand<u32>(w, i, 1), lanes, 1u << first);
  };
  t["bar.arrive"] = [](Warp& w, const Instruction& i, u32 lanes) {
    auto& [early, clock] = w.block->arrived[operand<u32>(w, i, 0)[first_lane(lanes)]];
    ++early;
    release(w, clock);
  };
}

const Table& instructions() {
  static const Table table = [] {
    Table t;
    add_arithmetic(t);
    add_collectives(t);
    add_memory(t);
    add_copies(t);
    add_matrices(t);
    add_tensor_maps(t);
    add_tensor_memory(t);
    return t;
  }();
  return table;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// The registers with which a warp begins, in a multiple of 64 bytes; how many of them are numbered because a wgmma uses
// them.
Module* emulator_module(const u8* registers, u64 register_bytes, int watched) {
  auto* m = new Module;
  m->registers.assign(registers, registers + register_bytes);
  m->watched = watched;
  return m;
}

void emulator_free(Module* m) { delete m; }

// The numbers are the fields of an instruction in their order; lists come behind their lengths. 1: there is no such
// function.
int emulator_add(Module* m, const char* name, const i64* numbers) {
  Instruction i;
  auto next = [&] { return *numbers++; };
  i.kind = (Kind)next();
  i.guard = next();
  i.negated = next();
  i.line = next();
  for (int& at : i.at) at = next();
  for (i64& imm : i.imm) imm = next();
  for (auto* list : {&i.list, &i.uses, &i.reads, &i.writes}) {
    list->resize(next());
    for (int& element : *list) element = next();
  }
  if (*name) {
    auto found = instructions().find(name);
    if (found == instructions().end()) return 1;
    i.run = found->second;
    i.copies = found->first == "mov.32";
  }
  m->code.push_back(i);
  return 0;
}

// Regions: low, high and the address of a map of valid bytes, or 0, of each. totals: executed warp instructions,
// products of two numbers, sectors read and written by any block, and summed over the blocks. 1: a fault, 2: races; see
// text.
int emulator_launch(Module* m, const int* grid, const int* threads, u64 shared_bytes, const u8* parameters,
                    u64 parameter_bytes, const u64* regions, int num_regions, u32 flags, u32 schedule, u64* totals,
                    char* text, u64 text_bytes) {
  Launch launch{};
  launch.module = m;
  for (int k = 0; k < 3; ++k) launch.grid[k] = grid[k], launch.threads[k] = threads[k];
  launch.flags = flags, launch.schedule = schedule;
  launch.parameters = parameters, launch.parameter_bytes = parameter_bytes, launch.shared_bytes = shared_bytes;
  for (int k = 0; k < num_regions; ++k) {
    launch.regions.push_back({regions[3 * k], regions[3 * k + 1], (const u8*)regions[3 * k + 2], {}, {}, {}, {}, {}});
  }
  m->counters.assign(m->code.size(), Counter());
  int status = 0;
  try {
    run_grid(launch);
  } catch (const Fault& f) {
    snprintf(text, text_bytes, "%s", f.what());
    status = 1;
  }
  if (!status && !launch.races.empty()) {
    std::string all;
    for (const auto& [what, times] : launch.races) all += what + ", " + std::to_string(times) + " times\n";
    snprintf(text, text_bytes, "%s", all.c_str());
    status = 2;
  }
  u64 read = 0, written = 0;
  for (const Region& r : launch.regions) {
    for (u8 sector : r.read) read += sector;
    for (u8 sector : r.written) written += sector;
  }
  const u64 found[] = {launch.executed, launch.macs, read, written, launch.block_reads, launch.block_writes};
  memcpy(totals, found, sizeof found);
  return status;
}

// Per instruction: executed, lanes, sectors and the fewest there could be, wavefronts and the fewest there could be.
void emulator_counters(const Module* m, u64* to) {
  memcpy(to, m->counters.data(), m->counters.size() * sizeof(Counter));
}
}
