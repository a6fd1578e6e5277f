// mma.sync, wgmma, ldmatrix and stmatrix.
#include <algorithm>

#include "descriptors.h"

namespace emulator {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));

Sixteen load16(const float* from) {
  Sixteen x;
  memcpy(&x, from, sizeof x);
  return x;
}
Sixteen four_times(const float* from) {
  Four x;
  memcpy(&x, from, sizeof x);
  const Eight y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3);  // g++ takes one step through memory
  return __builtin_shufflevector(y, y, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
}

// The operand A as multiply() takes it: a[k][half][lane] = A[lane / 4 + 8 * half][k].
using Left = float[16][2][LANES];

// D += A B for 16 rows. Lane 4 * g + t holds D[g][8j + 2t], [g][8j + 2t + 1] and the same of row g + 8 in registers 4j
// to 4j + 3. b[k][parity][4j + t] = B[k][8j + 2t + parity], ``pitch`` floats from k to k + 1.
void multiply(int depth, float* const* d, const Left& a, const float* b, int pitch, int columns, bool add) {
  for (int j = 0; j < columns / 8; ++j) {
    Sixteen sum[4][2];
    for (int q = 0; q < 4; ++q) {
      for (int h = 0; h < 2; ++h) sum[q][h] = add ? load16(d[4 * j + q] + 16 * h) : Sixteen{};
    }
    for (int k = 0; k < depth; ++k) {
      const float* row = b + k * pitch + 4 * j;
      const Sixteen even = four_times(row), odd = four_times(row + columns / 2);
      for (int half = 0; half < 2; ++half) {
        for (int h = 0; h < 2; ++h) {
          const Sixteen left = load16(&a[k][half][16 * h]);
          sum[2 * half][h] += left * even;
          sum[2 * half + 1][h] += left * odd;
        }
      }
    }
    for (int q = 0; q < 4; ++q) {
      for (int h = 0; h < 2; ++h) memcpy(d[4 * j + q] + 16 * h, &sum[q][h], sizeof(Sixteen));
    }
  }
}

// The four registers of A in mma.sync and wgmma: rows g and g + 8, first and second half of K.
template <class Format>
void left_of(u32* const* registers, Left& a) {
  constexpr int half = Elements<Format>::depth / 2;
  for (int r = 0; r < 4; ++r) {
    for (int k = 0; k < half; ++k) {
      float* to = a[half * (r >> 1) + k][r & 1];
      const u32* from = registers[r];
      if constexpr (half == 4) {
        for (int lane = 0; lane < LANES; ++lane) to[lane] = TF32::widen(from[(lane & ~3) + k]);
      } else {
        const int shift = 16 * (k & 1);
        for (int lane = 0; lane < LANES; ++lane) to[lane] = Format::widen(from[(lane & ~3) + k / 2] >> shift & 0xffff);
      }
    }
  }
}

// list: D, A, B, C
template <class Format>
void mma_sync(Warp& w, const Instruction& i, u32) {
  constexpr int depth = Elements<Format>::depth, half = depth / 2;
  alignas(64) Left a;
  u32* left[4];
  for (int r = 0; r < 4; ++r) left[r] = at_offset<u32>(w, i.list[4 + r]);
  left_of<Format>(left, a);
  float b[16 * 8];
  for (int k = 0; k < depth; ++k) {
    const u32* from = at_offset<u32>(w, i.list[8 + k / half]);
    for (int n = 0; n < 8; ++n) {
      u32 x = half == 4 ? from[4 * n + k % 4] : from[4 * n + k % 8 / 2] >> 16 * (k & 1) & 0xffff;
      b[k * 8 + 4 * (n & 1) + n / 2] = Format::widen(x);
    }
  }
  alignas(64) float sum[4][LANES];
  float* d[4];
  for (int q = 0; q < 4; ++q) {
    memcpy(sum[q], at_offset<float>(w, i.list[10 + q]), sizeof sum[q]);
    d[q] = sum[q];
  }
  multiply(depth, d, a, b, 8, 8, true);
  for (int q = 0; q < 4; ++q) memcpy(at_offset<float>(w, i.list[q]), sum[q], sizeof sum[q]);
  w.block->launch->macs += 16 * 8 * depth;
}

// ---- wgmma. at: descriptor of A or -1, descriptor of B, predicate of adding; imm: N, whether A and B are transposed;
// list: D, and A if it is in registers
Matrix matrix(Warp& w, u64 descriptor, bool transposed, int element) {
  static const int swizzles[] = {0, 128, 64, 32};
  if (descriptor >> 49 & 7) fault(w, "matrix descriptor with a base offset");
  return matrix_of(descriptor, swizzles[descriptor >> 62], !transposed, element);
}

template <class Format>
void compute(Warp& w, const WarpMma& product) {
  using E = Elements<Format>;
  const Instruction& i = *product.instruction;
  const int columns = i.imm[0], own = 16 * (w.id % 4);
  alignas(64) Left a;
  float* d[128];
  for (int r = 0; r < columns / 2; ++r) d[r] = at_offset<float>(w, i.list[r]);
  if (i.at[0] < 0) {
    u32* left[4];
    for (int r = 0; r < 4; ++r) left[r] = at_offset<u32>(w, i.list[columns / 2 + r]);
    left_of<Format>(left, a);
  } else {
    float rows[16][16];
    read_matrix<Format>(w, matrix(w, product.a, i.imm[1], E::bytes), own, 16, rows[0], 16);
    for (int k = 0; k < E::depth; ++k) {
      for (int lane = 0; lane < LANES; ++lane) {
        for (int half = 0; half < 2; ++half) a[k][half][lane] = rows[k][lane / 4 + 8 * half];
      }
    }
  }
  alignas(64) static thread_local float straight[16 * 256], b[16 * 256];
  read_matrix<Format>(w, matrix(w, product.b, i.imm[2], E::bytes), 0, columns, straight, columns);
  for (int k = 0; k < E::depth; ++k) {
    const float* from = straight + k * columns;
    float *even = b + k * columns, *odd = even + columns / 2;
    for (int n = 0; n < columns / 2; ++n) even[n] = from[2 * n], odd[n] = from[2 * n + 1];
  }
  multiply(E::depth, d, a, b, columns, columns, product.add);
  w.block->launch->macs += 16 * columns * E::depth;
}

template <class Format>
void check_operands(Warp& w, const WarpMma& product) {
  using E = Elements<Format>;
  const Instruction& i = *product.instruction;
  // Four warps read B together.
  check_operand(w, i, matrix(w, product.b, i.imm[2], E::bytes), 0, i.imm[0], E::depth, w.id % 4 == 0);
  if (i.at[0] < 0) return;
  check_operand(w, i, matrix(w, product.a, i.imm[1], E::bytes), 16 * (w.id % 4), 16, E::depth, true);
}

void mark(Warp& w, const WarpMma& product, bool flying) {
  const Instruction& i = *product.instruction;
  const size_t accumulators = i.imm[0] / 2;
  for (size_t r = 0; r < i.uses.size(); ++r) {
    u8& state = w.flying[i.uses[r]];
    state = flying ? (r < accumulators ? 1 : 2) : 0;
  }
}

template <class Format>
void wgmma(Warp& w, const Instruction& i, u32) {
  const bool add = i.at[2] < 0 || (*operand<u32>(w, i, 2) & 1);
  WarpMma product{&i, i.at[0] < 0 ? 0 : *operand<u64>(w, i, 0), *operand<u64>(w, i, 1), add};
  Launch& launch = *w.block->launch;
  if (launch.checks() || launch.counts()) check_operands<Format>(w, product);
  if (launch.checks()) {
    for (size_t r = 0; r < i.uses.size(); ++r) {
      const int k = i.uses[r];
      const bool accumulates = (int)r < i.imm[0] / 2;
      if (w.flying[k] == (accumulates ? 2 : 1)) {
        race(w, "wgmma with a register that a wgmma in flight uses %s", accumulates ? "as A" : "to accumulate");
      }
      if (w.unfenced[k]) race(w, "wgmma with a register that was written after the last wgmma.fence");
      w.unfenced[k] = 0;
    }
    mark(w, product, true);
  }
  if (!add) {
    for (int r = 0; r < i.imm[0] / 2; ++r) memset(at_offset<float>(w, i.list[r]), 0xff, LANES * sizeof(float));
  }
  w.open_products.push_back(product);
}

void commit(Warp& w, const Instruction&, u32) {
  w.products.push_back(std::move(w.open_products));
  w.open_products.clear();
  ++w.product_groups;
}

void wait(Warp& w, const Instruction& i, u32) {
  const size_t left = i.imm[0];
  if (w.products.size() <= left) return;
  const size_t over = w.products.size() - left;
  for (size_t g = 0; g < over; ++g) {
    for (const WarpMma& product : w.products[g]) {
      if (product.instruction->run == &wgmma<BF16>) {
        compute<BF16>(w, product);
      } else if (product.instruction->run == &wgmma<F16>) {
        compute<F16>(w, product);
      } else {
        compute<TF32>(w, product);
      }
      mark(w, product, false);
    }
  }
  w.products.erase(w.products.begin(), w.products.begin() + over);
  for (const auto& group : w.products) {  // what a later product uses, too, stays in flight
    for (const WarpMma& product : group) mark(w, product, true);
  }
  for (const WarpMma& product : w.open_products) mark(w, product, true);
  w.clock.at[MMA + w.id] = w.product_groups - left;
}

// ---- ldmatrix, stmatrix. at[0]: address; imm: offset, whether transposed; list: a register for each 8 x 8 matrix
void move_matrices(Warp& w, const Instruction& i, bool load) {
  Launch& launch = *w.block->launch;
  const int count = i.list.size();
  u64 address[LANES];
  for (int lane = 0; lane < LANES; ++lane) address[lane] = (u32)(operand<u32>(w, i, 0)[lane] + i.imm[0]);
  for (int j = 0; j < count; ++j) {
    u16 rows[8][8];
    u32* to = at_offset<u32>(w, i.list[j]);
    auto element = [&](int lane, int k) -> u16& {
      int row = lane / 4, column = lane % 4 * 2 + k;
      return i.imm[1] ? rows[column][row] : rows[row][column];
    };
    if (!load) {
      for (int lane = 0; lane < LANES; ++lane) element(lane, 0) = to[lane], element(lane, 1) = to[lane] >> 16;
    }
    for (int r = 0; r < 8; ++r) {
      u8* place = shared_memory(w, address[8 * j + r], 16, !load);
      if (launch.checks())
        check_shared(w, own(w, address[8 * j + r], 16, load ? READ : WRITE, load ? nullptr : rows[r]));
      load ? memcpy(rows[r], place, 16) : memcpy(place, rows[r], 16);
    }
    if (load) {
      for (int lane = 0; lane < LANES; ++lane) to[lane] = element(lane, 0) | (u32)element(lane, 1) << 16;
    }
  }
  if (launch.counts()) count_shared(w, i, address, count == 4 ? ALL : (1u << 8 * count) - 1, 16);
}

}  // namespace

void add_matrices(Table& t) {
  t["mma.bf16"] = mma_sync<BF16>;
  t["mma.f16"] = mma_sync<F16>;
  t["mma.tf32"] = mma_sync<TF32>;
  t["wgmma.bf16"] = wgmma<BF16>;
  t["wgmma.f16"] = wgmma<F16>;
  t["wgmma.tf32"] = wgmma<TF32>;
  t["wgmma.fence"] = [](Warp& w, const Instruction&, u32) { std::fill(w.unfenced.begin(), w.unfenced.end(), 0); };
  t["wgmma.commit"] = commit;
  t["wgmma.wait"] = wait;
  t["ldmatrix"] = [](Warp& w, const Instruction& i, u32) { move_matrices(w, i, true); };
  t["stmatrix"] = [](Warp& w, const Instruction& i, u32) { move_matrices(w, i, false); };
}

}  // namespace emulator
