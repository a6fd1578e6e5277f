// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/matmul_cpu.h"
#include "common/tile.h"

namespace {

static_assert(mk::matmul_row_step % tile_rows == 0 && mk::matmul_rows % mk::matmul_row_step == 0 &&
                  mk::matmul_columns % tile_columns == 0,
              "blocks consist of tiles");

// Returns K in units.
template <class Product>
inline int64_t units(int64_t K) {
  return (K + Product::depth - 1) / Product::depth;
}

// a is packed in pieces of `Product::chain` units along its rows, (matmul_rows, Product::chain) each; b in tiles of
// columns, (units, tile_columns) each. The last unit is padded with zero. The padding of tiles stays uninitialised; its
// sums are never read.
template <class Product>
int64_t left_bytes(int64_t K) {
  return round_up(units<Product>(K), Product::chain) * mk::matmul_rows * (int64_t)sizeof(unit);
}
template <class Product>
int64_t right_bytes(int64_t K, int64_t N) {
  return units<Product>(K) * round_up(N, tile_columns) * (int64_t)sizeof(unit);
}

template <class Format>
inline vfloat gather(const typename Format::type* p, int64_t stride, int count) {
  if (stride == 1) return load<Format>(p, count);
  typename Format::type elements[lanes] = {};
  for (int i = 0; i < count; ++i) elements[i] = p[i * stride];
  return load<Format>(elements, lanes);
}

// Joins `count` neighbours of row k of a matrix with K rows to units, together with those of the next row if a unit has
// two elements.
template <class Format, class Product>
MK_INLINE void join(const typename Format::type* p, int64_t stride, int64_t k, int64_t K, int count, unit* dst) {
  const bool both = Product::depth == 2 && k + 1 < K;
  Product::store_units(dst, load<Format>(p, count), both ? load<Format>(p + stride, count) : vfloat{});
}

constexpr int64_t staged = 64;  // elements of a column of b

template <class Format, class Product>
void pack_right(const mk_matmul_args& m, int64_t begin, int64_t end, void* right) {
  typedef typename Format::type type;
  for (int64_t n = begin; n < end; n += tile_columns) {
    unit* const dst = (unit*)right + n * units<Product>(m.K);
    const type* const b = (const type*)m.b + n * m.b_stride_column;
    const int64_t columns = least(end - n, tile_columns);
    if (m.b_stride_column == 1) {
      for (int64_t k = 0; k < m.K; k += Product::depth) {
        for_each_register<F32>(columns, [&](int64_t j, int count) MK_ALWAYS_INLINE {
          join<Format, Product>(b + k * m.b_stride_row + j, m.b_stride_row, k, m.K, count,
                                dst + k / Product::depth * tile_columns + j);
        });
      }
      continue;
    }
    for (int64_t k = 0; k < m.K; k += staged) {
      alignas(64) typename Product::element rows[tile_columns * staged];
      const int64_t length = least(m.K - k, staged);
      for (int64_t j = 0; j < columns; ++j) {
        const type* const column = b + j * m.b_stride_column + k * m.b_stride_row;
        for_each_register<F32>(length, [&](int64_t i, int count) MK_ALWAYS_INLINE {
          Product::store(rows + j * staged + i, gather<Format>(column + i * m.b_stride_row, m.b_stride_row, count));
        });
      }
      to_columns((const unit*)rows, staged / Product::depth, units<Product>(length),
                 dst + k / Product::depth * tile_columns);
    }
  }
}

template <class Format, class Product>
void pack_left(const mk_matmul_args& m, int64_t row, int64_t rows, void* left) {
  typedef typename Format::type type;
  const int64_t length = Product::chain * Product::depth;
  for (int64_t k = 0; k < m.K; k += length) {
    const type* const a = (const type*)m.a + row * m.a_stride_row + k * m.a_stride_column;
    unit* const dst = (unit*)left + k / Product::depth * mk::matmul_rows;
    const int64_t columns = least(m.K - k, length);
    if (m.a_stride_row == 1) {
      for (int64_t j = 0; j < columns; j += Product::depth) {
        for_each_register<F32>(rows, [&](int64_t i, int count) MK_ALWAYS_INLINE {
          alignas(64) unit joined[lanes];
          join<Format, Product>(a + j * m.a_stride_column + i, m.a_stride_column, j, columns, count, joined);
          for (int l = 0; l < count; ++l) dst[(i + l) * Product::chain + j / Product::depth] = joined[l];
        });
      }
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) {
      typename Product::element* const to = (typename Product::element*)(dst + i * Product::chain);
      for_each_register<F32>(columns, [&](int64_t j, int count) MK_ALWAYS_INLINE {
        Product::store(to + j,
                       gather<Format>(a + i * m.a_stride_row + j * m.a_stride_column, m.a_stride_column, count));
      });
    }
  }
}

template <class Format, class Product>
void block(const mk_matmul_args& m, const void* left, const void* right, int64_t row, int64_t rows, int64_t column) {
  typedef typename Format::type type;
  alignas(64) float sums[mk::matmul_rows * tile_columns];
  const int64_t end = least(m.N, column + mk::matmul_columns);
  const int64_t K = units<Product>(m.K);
  for (; column < end; column += tile_columns) {
    memset(sums, 0, round_up(rows, tile_rows) * tile_columns * sizeof *sums);
    for (int64_t k = 0; k < K; k += Product::chain) {
      const int64_t depth = least(K - k, Product::chain);
      const unit* const a = (const unit*)left + k * mk::matmul_rows;
      const unit* const b = (const unit*)right + column * K + k * tile_columns;
      for (int64_t i = 0; i < rows; i += tile_rows) {
        multiply<Product, true>(a + i * Product::chain, Product::chain, b, depth, sums + i * tile_columns,
                                tile_columns);
      }
    }
    const type* const bias = m.bias ? (const type*)m.bias + column : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      const type* const added = m.added ? (const type*)m.added + (row + i) * m.added_stride_row + column : nullptr;
      type* const c = (type*)m.c + (row + i) * m.c_stride_row + column;
      for_each_register<F32>(least(end - column, tile_columns), [&](int64_t j, int count) MK_ALWAYS_INLINE {
        vfloat v = load(sums + i * tile_columns + j);
        if (bias) v += load<Format>(bias + j, count);
        if (added) v += load<Format>(added + j, count);
        store<Format>(c + j, count, v);
      });
    }
  }
}

template <class Format, class Product>
constexpr mk::MatmulOf loops = {left_bytes<Product>, right_bytes<Product>, pack_right<Format, Product>,
                                pack_left<Format, Product>, block<Format, Product>};

}  // namespace

extern const mk::MatmulLoops MK_ISA_NAME(matmul_loops) = {loops<F32, F32Product>, loops<BF16InOrder, NarrowProduct>};
