// For loops: packs rows of a head, rotated or not, as operands of products.
#pragma once

#include "common/tile.h"
#include "expert_attention/expert_attention_cpu.h"
#include "rope2d/rotate.h"

namespace {

// Copies a row of D elements, rotated if there are tables, and pads it with zeros to a multiple of `lanes` elements.
template <class Format, class Product>
inline void stage_row(const typename Format::type* src, int64_t D, const float* cos, const float* sin,
                      typename Product::element* dst) {
  for_each_register<F32>(D, [&](int64_t d, int count) MK_ALWAYS_INLINE {
    vfloat v = load<Format>(src + d, count);
    if (cos) v = rotate<false>(v, load<F32>(cos + d, count), load<F32>(sin + d, count));
    Product::store(dst + d, v);
  });
}

constexpr int64_t rows_ahead = 8;

// Token-major rows of one head of one pair.
template <class Format>
struct Rows {
  const typename Format::type* data;
  int64_t stride;          // elements from token to token
  const float *cos, *sin;  // (tokens, D), or null: no rotation
};

// Copies `rows` rows from `first` on to rows of round_up(D, lanes) elements; from row `end` on they are zeros.
template <class Format, class Product>
inline void stage(const Rows<Format>& x, int64_t first, int64_t rows, int64_t end, int64_t D,
                  typename Product::element* dst) {
  const int64_t width = round_up(D, lanes);
  for (int64_t i = 0; i < rows; ++i, dst += width) {
    const int64_t t = first + i;
    // Rows of a head are too far from each other for the prefetching of the processor.
    const char* const ahead = (const char*)(x.data + (t + rows_ahead) * x.stride);
    for (int64_t line = 0; line < D * (int64_t)sizeof *x.data; line += 64) __builtin_prefetch(ahead + line);
    if (t >= end) {
      memset(dst, 0, width * sizeof *dst);
    } else if (x.cos) {
      stage_row<Format, Product>(x.data + t * x.stride, D, x.cos + t * D, x.sin + t * D, dst);
    } else {
      stage_row<Format, Product>(x.data + t * x.stride, D, nullptr, nullptr, dst);
    }
  }
}

// Packs tokens as columns of a right operand: (padded / tile_columns, D in units, tile_columns). Tokens from L on are
// zeros.
template <class Format, class Product>
void pack_columns(const Rows<Format>& x, int64_t L, int64_t padded, int64_t D, unit* dst) {
  alignas(64) typename Product::element rows[tile_columns * MK_MAX_HEAD_WIDTH];
  const int64_t units = round_up(D, lanes) / Product::depth, used = (D + Product::depth - 1) / Product::depth;
  for (int64_t t = 0; t < padded; t += tile_columns) {
    stage<Format, Product>(x, t, tile_columns, L, D, rows);
    to_columns((const unit*)rows, units, used, dst);
    dst += used * tile_columns;
  }
}

// Packs tokens as the depth of a right operand: (D / tile_columns, padded in units, tile_columns). Tokens from L on are
// zeros.
template <class Format, class Product>
void pack_depth(const Rows<Format>& x, int64_t L, int64_t padded, int64_t D, unit* dst) {
  constexpr int depth = Product::depth;
  const int64_t step = padded / depth * tile_columns, columns = round_up(D, tile_columns);
  alignas(64) float rows[depth][MK_MAX_HEAD_WIDTH];
  memset(rows, 0, sizeof rows);
  for (int64_t t = 0; t < padded; t += depth, dst += tile_columns) {
    stage<Format, F32Product>(x, t, 1, L, D, rows[0]);
    if constexpr (depth == 2) stage<Format, F32Product>(x, t + 1, 1, L, D, rows[1]);
    for (int64_t d = 0; d < columns; d += lanes) {
      Product::store_units(dst + d / tile_columns * step + d % tile_columns, load(rows[0] + d),
                           load(rows[depth - 1] + d));
    }
  }
}

inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

inline float max_lane(vfloat v) {
  float most = v[0];
  for (int i = 1; i < lanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// Returns the squared length of the longest token; NaN counts as 0. The tokens are packed as columns, and their number
// is a multiple of tile_columns.
template <class Product>
float longest_column(const unit* tokens, int64_t count, int64_t units) {
  vfloat longest = {};
  for (int64_t j = 0; j < count; j += tile_columns) {
    vfloat squares[tile_vectors] = {};
    for (int64_t k = 0; k < units; ++k, tokens += tile_columns) {
      MK_UNROLL for (int n = 0; n < tile_vectors; ++n) {
        vuint v;
        memcpy(&v, tokens + n * lanes, sizeof v);
        squares[n] = Product::add(v, v, squares[n]);
      }
    }
    MK_UNROLL for (int n = 0; n < tile_vectors; ++n) longest = max(squares[n], longest);
  }
  return max_lane(longest);
}

// The same for tokens in rows.
template <class Product>
float longest_row(const unit* tokens, int64_t count, int64_t row_units) {
  float longest = 0;
  for (int64_t i = 0; i < count; ++i, tokens += row_units) {
    vfloat squares[1] = {};
    for_each_register<F32>(row_units, [&](int64_t k, int count) MK_ALWAYS_INLINE {
      vuint v = {};
      memcpy(&v, tokens + k, count * sizeof *tokens);
      squares[0] = Product::add(v, v, squares[0]);
    });
    const float square = total(squares);
    longest = square > longest ? square : longest;
  }
  return longest;
}

// Whether a score and all partial sums of it are finite, given the product of the squared lengths of query and key.
inline bool holds_scores(float squares) { return squares <= __FLT_MAX__; }

}  // namespace
