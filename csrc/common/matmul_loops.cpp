// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/matmul_cpu.h"
#include "common/tile.h"

namespace {

static_assert(mk::matmul_rows % tile_rows == 0 && mk::matmul_columns % tile_columns == 0, "blocks consist of tiles");

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// a is packed in pieces of `chain` columns, (matmul_rows, chain) each; b in tiles of columns, (K, tile_columns) each.
int64_t left_bytes(int64_t K) { return round_up(K, chain) * mk::matmul_rows * (int64_t)sizeof(float); }
int64_t right_bytes(int64_t K, int64_t N) { return K * round_up(N, tile_columns) * (int64_t)sizeof(float); }

void pack_right(const mk_matmul_args& m, int64_t begin, int64_t end, void* right) {
  const float* const b = (const float*)m.b;
  for (int64_t n = begin; n < end; n += tile_columns) {
    float* const dst = (float*)right + n * m.K;
    const int64_t columns = least(end - n, tile_columns);
    if (columns < tile_columns) memset(dst, 0, m.K * tile_columns * sizeof *dst);
    if (m.b_stride_column == 1) {
      for (int64_t k = 0; k < m.K; ++k) {
        memcpy(dst + k * tile_columns, b + k * m.b_stride_row + n, columns * sizeof *dst);
      }
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        const float* const column = b + (n + j) * m.b_stride_column;
        for (int64_t k = 0; k < m.K; ++k) dst[k * tile_columns + j] = column[k * m.b_stride_row];
      }
    }
  }
}

void pack_left(const mk_matmul_args& m, int64_t row, void* left) {
  const int64_t rows = least(m.M - row, mk::matmul_rows);
  for (int64_t k = 0; k < m.K; k += chain) {
    const float* const a = (const float*)m.a + row * m.a_stride_row + k * m.a_stride_column;
    float* const dst = (float*)left + k * mk::matmul_rows;
    const int64_t depth = least(m.K - k, chain);
    if (rows < mk::matmul_rows) memset(dst, 0, mk::matmul_rows * chain * sizeof *dst);
    if (m.a_stride_column == 1) {
      for (int64_t i = 0; i < rows; ++i) memcpy(dst + i * chain, a + i * m.a_stride_row, depth * sizeof *dst);
    } else {
      for (int64_t j = 0; j < depth; ++j) {
        for (int64_t i = 0; i < rows; ++i) dst[i * chain + j] = a[i * m.a_stride_row + j * m.a_stride_column];
      }
    }
  }
}

void block(const mk_matmul_args& m, const void* left, const void* right, int64_t row, int64_t column) {
  alignas(64) float sums[mk::matmul_rows * tile_columns];
  const int64_t rows = least(m.M - row, mk::matmul_rows), end = least(m.N, column + mk::matmul_columns);
  for (; column < end; column += tile_columns) {
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < m.K; k += chain) {
      const int64_t depth = least(m.K - k, chain);
      const unit* const a = (const unit*)left + k * mk::matmul_rows;
      const unit* const b = (const unit*)right + column * m.K + k * tile_columns;
      for (int64_t i = 0; i < rows; i += tile_rows) {
        multiply<F32Product, true>(a + i * chain, chain, b, depth, sums + i * tile_columns, tile_columns);
      }
    }
    const float* const bias = m.bias ? (const float*)m.bias + column : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      const float* const added = m.added ? (const float*)m.added + (row + i) * m.added_stride_row + column : nullptr;
      float* const c = (float*)m.c + (row + i) * m.c_stride_row + column;
      for_lanes(least(end - column, tile_columns), [&](int64_t j, int count) __attribute__((always_inline)) {
        vfloat v = load(sums + i * tile_columns + j);
        if (bias) v += load<F32>(bias + j, count);
        if (added) v += load<F32>(added + j, count);
        store<F32>(c + j, count, v);
      });
    }
  }
}

}  // namespace

extern const mk::MatmulLoops MK_ISA_NAME(matmul_loops) = {left_bytes, right_bytes, pack_right, pack_left, block};
