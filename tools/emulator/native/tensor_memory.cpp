// tcgen05 of sm_100: tensor memory, and products that accumulate in it.
#include <algorithm>

#include "descriptors.h"

namespace emulator {
namespace {

constexpr u32 COLUMNS = 512, TENSOR_LANES = 128;  // of 32 bits

u32& tensor_word(Warp& w, u32 lane, u32 column) {
  Block& block = *w.block;
  if (lane >= TENSOR_LANES || column >= block.tensor_columns) {
    fault(w, "tensor memory at lane %u, column %u of %u", lane, column, block.tensor_columns);
  }
  return block.tensor[lane * COLUMNS + column];
}

// at[0]: shared address that takes the result; imm: offset, columns
void allocate(Warp& w, const Instruction& i, u32 lanes) {
  Block& block = *w.block;
  u32 first = block.tensor_columns;
  block.tensor_columns += i.imm[1];
  if (block.tensor_columns > COLUMNS) fault(w, "no tensor memory left");
  u64 address = operand<u32>(w, i, 0)[first_lane(lanes)] + i.imm[0];
  u8* place = shared_memory(w, address, 4, true);
  if (block.launch->checks()) check_shared(w, own(w, address, 4, WRITE, &first));
  memcpy(place, &first, 4);
}

// at: address, columns. Nobody may use them any more, as if they were written.
void release_columns(Warp& w, const Instruction& i, u32) {
  Block& block = *w.block;
  const u32 first = operand<u32>(w, i, 0)[0] & 0xffff, count = operand<u32>(w, i, 1)[0];
  for (u32 lane = 0; lane < TENSOR_LANES && block.launch->checks(); lane += 16) {
    for (u32 column = first; column < first + count; ++column) {
      check_tensor_memory(w, lane, column, true, w.id, w.clock.at[w.id]);
      block.columns[lane / 16 * COLUMNS + column] = TensorColumn();
    }
  }
  block.tensor_columns -= count;
}

// The fields of the instruction descriptor of tcgen05.mma.
struct Shape {
  int rows, columns;
  bool a_transposed, b_transposed, a_bf16, b_bf16;
};
Shape shape_of(Warp& w, u32 description) {
  if ((description >> 4 & 3) != 1 || (description & 15) || (description >> 13 & 3)) {
    fault(w, "instruction descriptor %08x: only plain products with fp32 accumulators are known", description);
  }
  Shape s{(int)(description >> 24 & 31) * 16, (int)(description >> 17 & 63) * 8, (bool)(description >> 15 & 1),
          (bool)(description >> 16 & 1),      (description >> 7 & 7) == 1,       (description >> 10 & 7) == 1};
  if (s.rows != 64 && s.rows != 128) fault(w, "tcgen05.mma with %d rows", s.rows);
  return s;
}

Matrix matrix(Warp& w, u64 descriptor, bool transposed, int element) {
  static const int swizzles[] = {0, -1, 128, -1, 64, -1, 32, -1};
  int swizzle = swizzles[descriptor >> 61];
  if (swizzle < 0 || (descriptor >> 49 & 7) || (descriptor >> 46 & 7) != 1) {
    fault(w, "matrix descriptor %llx is of an unknown kind", (unsigned long long)descriptor);
  }
  return matrix_of(descriptor, swizzle, !transposed, element);
}

u32 lane_of(const Shape& s, int row) { return s.rows == 128 ? row : 32 * (row / 16) + row % 16; }

template <class A, class B>
void compute(Warp& w, const TensorMma& p, const Shape& s) {
  constexpr int depth = Elements<B>::depth, bytes = Elements<B>::bytes;
  alignas(64) static thread_local float a[16][128], b[16][256];
  if (p.a_in_shared) {
    read_matrix<A>(w, matrix(w, p.a, s.a_transposed, bytes), 0, s.rows, a[0], 128);
  } else {
    for (int row = 0; row < s.rows; ++row) {
      for (int k = 0; k < depth; ++k) {
        u32 column = ((u32)p.a & 0xffff) + (bytes == 4 ? k : k / 2);
        u32 word = tensor_word(w, (p.a >> 16) + lane_of(s, row), column);
        a[k][row] = A::widen(bytes == 4 ? word : word >> 16 * (k & 1) & 0xffff);
      }
    }
  }
  read_matrix<B>(w, matrix(w, p.b, s.b_transposed, bytes), 0, s.columns, b[0], 256);
  for (int row = 0; row < s.rows; ++row) {
    float* d = (float*)&tensor_word(w, (p.d >> 16) + lane_of(s, row), p.d & 0xffff);
    if (!p.add) std::fill_n(d, s.columns, 0.0f);
    for (int k = 0; k < depth; ++k) {
      const float left = a[k][row];
      for (int n = 0; n < s.columns; ++n) d[n] += left * b[k][n];
    }
  }
  w.block->launch->macs += (u64)s.rows * s.columns * depth;
}

// at: D, A's address in tensor memory or -1, A's descriptor or -1, B's descriptor, instruction descriptor, predicate of
// adding; imm: offsets of D and A, whether the kind is tf32
void mma(Warp& w, const Instruction& i, u32 lanes) {
  Block& block = *w.block;
  const int lane = first_lane(lanes);
  TensorMma p{};
  p.tf32 = i.imm[2];
  p.a_in_shared = i.at[1] < 0;
  p.a = p.a_in_shared ? operand<u64>(w, i, 2)[lane] : operand<u32>(w, i, 1)[lane] + i.imm[1];
  p.b = operand<u64>(w, i, 3)[lane];
  p.d = operand<u32>(w, i, 0)[lane] + i.imm[0];
  p.description = operand<u32>(w, i, 4)[lane];
  p.add = *operand<u32>(w, i, 5) >> lane & 1;
  const Shape s = shape_of(w, p.description);
  const int bytes = p.tf32 ? 4 : 2, depth = p.tf32 ? 8 : 16;
  check_operand(w, i, matrix(w, p.b, s.b_transposed, bytes), 0, s.columns, depth, true);
  if (p.a_in_shared) check_operand(w, i, matrix(w, p.a, s.a_transposed, bytes), 0, s.rows, depth, true);
  for (int row = 0; row < s.rows && !p.add; ++row) {
    tensor_word(w, (p.d >> 16) + lane_of(s, row), (p.d & 0xffff) + s.columns - 1);
    std::fill_n(&tensor_word(w, (p.d >> 16) + lane_of(s, row), p.d & 0xffff), s.columns, ALL);
  }
  if (block.launch->checks()) {
    auto check_columns = [&](u32 address, int columns, bool write) {
      for (u32 lane = address >> 16; lane < TENSOR_LANES; lane += s.rows == 128 ? 16 : 32) {
        for (int k = 0; k < columns; ++k) {
          check_tensor_memory(w, lane, (address & 0xffff) + k, write, MMA + w.id, w.product_groups + 1);
        }
      }
    };
    if (!p.a_in_shared) check_columns((u32)p.a, depth * bytes / 4, false);
    if (p.add) check_columns(p.d, s.columns, false);
    check_columns(p.d, s.columns, true);
  }
  block.products.push_back(p);
}

// at[0]: mbarrier
void commit(Warp& w, const Instruction& i, u32 lanes) {
  const int lane = first_lane(lanes);
  u64 address = i.imm[1] == 8 ? operand<u64>(w, i, 0)[lane] : operand<u32>(w, i, 0)[lane];
  Mbarrier& b = mbarrier(w, address + i.imm[0]);
  if (b.pending <= b.commits.size()) fault(w, "tcgen05.commit to an mbarrier that awaits no more arrivals");
  b.arriving.join(w.clock);
  b.commits.push_back({w.block->products.size(), w.id, ++w.product_groups});
}

// at[0]: address; imm: offset, whether it stores, columns between the halves of 16 lanes or -1; list: registers
void move(Warp& w, const Instruction& i, u32 lanes) {
  if (lanes != ALL) fault(w, "tcgen05.ld or st by some lanes only");
  Block& block = *w.block;
  const u32 address = operand<u32>(w, i, 0)[0] + i.imm[0], first = address >> 16, column = address & 0xffff;
  const bool store = i.imm[1];
  const i64 split = i.imm[2];
  if (first / 32 != (u32)w.id % 4) fault(w, "this warp may not access the lanes of tensor memory from %u on", first);
  for (size_t r = 0; r < i.list.size(); ++r) {
    u32* registers = at_offset<u32>(w, i.list[r]);
    for (int half = 0; half < 2 && block.launch->checks(); ++half) {  // 16 lanes each
      const u32 at = column + r + (half && split >= 0 ? split : 0), lane = first + (half && split < 0 ? 16 : 0);
      if (at >= block.tensor_columns) fault(w, "tensor memory at column %u of %u", at, block.tensor_columns);
      check_tensor_memory(w, lane, at, store, store ? w.id : LOAD + w.id,
                          store ? w.clock.at[w.id] : w.tensor_loads + 1);
      if (store) w.stored_columns.push_back(&block.columns[lane / 16 * COLUMNS + at]);
    }
    for (u32 lane = 0; lane < LANES; ++lane) {
      u32& word =
          tensor_word(w, first + (split < 0 ? lane : lane % 16), column + r + (split >= 0 && lane >= 16 ? split : 0));
      if (store) {
        w.tensor_stores.push_back({&word, registers[lane]});
        word = ALL;
      } else {
        // ISA asks for tcgen05.wait::ld before the register is read. Triton's code reads earlier, and is right on a
        // GPU.
        registers[lane] = word;
      }
    }
  }
}

void wait_for_stores(Warp& w, const Instruction&, u32) {
  for (auto [word, value] : w.tensor_stores) *word = value;
  w.tensor_stores.clear();
  for (TensorColumn* column : w.stored_columns) column->pending = false;
  w.stored_columns.clear();
}

}  // namespace

// The products before ``until``, by any warp, in order.
void finish_products(Warp& w, size_t until) {
  Block& block = *w.block;
  for (; block.products_done < until; ++block.products_done) {
    const TensorMma& p = block.products[block.products_done];
    const Shape s = shape_of(w, p.description);
    if (p.tf32) {
      compute<TF32, TF32>(w, p, s);
    } else if (s.a_bf16 && s.b_bf16) {
      compute<BF16, BF16>(w, p, s);
    } else if (!s.a_bf16 && !s.b_bf16) {
      compute<F16, F16>(w, p, s);
    } else {
      fault(w, "tcgen05.mma of two formats");
    }
  }
}

void add_tensor_memory(Table& t) {
  t["tcgen05.alloc"] = allocate;
  t["tcgen05.dealloc"] = release_columns;
  t["tcgen05.mma"] = mma;
  t["tcgen05.commit"] = commit;
  t["tcgen05.move"] = move;
  t["tcgen05.wait.st"] = wait_for_stores;
  t["tcgen05.wait.ld"] = [](Warp& w, const Instruction&, u32) { w.clock.at[LOAD + w.id] = ++w.tensor_loads; };
}

}  // namespace emulator
