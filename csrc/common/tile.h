// Products of packed matrices, with a tile of the result in registers. For loops, which are compiled once per
// instruction set.
//
// Operands consist of 32-bit units: one fp32, or two bf16 that are neighbours along the depth of the product. The left
// operand has rows of units; the right one is packed as (depth in units, tile_columns), so that a vector holds one unit
// of each of its columns.
#pragma once

#include "common/channels.h"

namespace {

// The accumulators of a tile, a row of the right operand and one unit of the left fill the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = 2;
#endif
constexpr int tile_rows = 6, tile_columns = tile_vectors * lanes;
typedef vfloat Tile[tile_rows][tile_vectors];
typedef uint32_t unit __attribute__((may_alias));

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// How elements are multiplied, in units of `depth` elements. The elements of a unit are neighbours in a row of the
// left operand, and come from `depth` rows of the right one, which store_units joins. A sum of more than `chain` units
// is made of shorter sums: in fp32 because the error of a sum grows with its length, in bf16 because that was measured
// to be kinder to the caches. `coarse` says whether the coarse exp2 is good enough.
struct F32Product {
  typedef float element;
  static constexpr int depth = 1;
  static constexpr int64_t chain = 96;
  static constexpr bool coarse = false;

  static inline vfloat add(vuint a, vuint b, vfloat c) { return (vfloat)a * (vfloat)b + c; }
  static inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
  static inline void store_units(unit* p, vfloat v, vfloat) { memcpy(p, &v, sizeof v); }
};

#if defined(__AVX512BF16__)
struct BF16Product {
  typedef uint16_t element;
  static constexpr int depth = 2;
  static constexpr int64_t chain = 768;
  static constexpr bool coarse = true;

  static inline vfloat add(vuint a, vuint b, vfloat c) {
    return (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  // Rounds to nearest, ties to even; denormals become zeros.
  static inline void store(uint16_t* p, vfloat v) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &narrow, sizeof narrow);
  }
  // A vector of units (even[i], odd[i]).
  static inline void store_units(unit* p, vfloat even, vfloat odd) {
    const __m512bh narrow = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i interleave = (__m512i)(vshort{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
    const __m512i units = _mm512_permutexvar_epi16(interleave, (__m512i)narrow);
    memcpy(p, &units, sizeof units);
  }

 private:
  typedef short vshort __attribute__((vector_size(64)));
};
#endif

// For bf16 tensors, which are widened where the processor has no products of bf16.
#if defined(__AVX512BF16__)
typedef BF16Product NarrowProduct;
#else
typedef F32Product NarrowProduct;
#endif

// sum += a * b over `depth` units. Row m of the left operand begins at a + m * a_stride.
template <class Product>
inline void add_product(const unit* a, int64_t a_stride, const unit* b, int64_t depth, Tile& sum) {
  for (int64_t k = 0; k < depth; ++k, b += tile_columns) {
    vuint right[tile_vectors];
    MK_UNROLL for (int n = 0; n < tile_vectors; ++n) memcpy(&right[n], b + n * lanes, sizeof right[n]);
    MK_UNROLL for (int m = 0; m < tile_rows; ++m) {
      const vuint left = vuint{} + a[m * a_stride + k];
      MK_UNROLL for (int n = 0; n < tile_vectors; ++n) sum[m][n] = Product::add(left, right[n], sum[m][n]);
    }
  }
}

// Transposes lanes x lanes units: each step exchanges one bit of the row number with that bit of the lane number.
inline void transpose(vuint (&rows)[lanes]) {
  MK_UNROLL for (int bit = 1; bit < lanes; bit *= 2) {
    vuint first, second;
    MK_UNROLL for (int l = 0; l < lanes; ++l) {
      first[l] = l & bit ? lanes + l - bit : l;
      second[l] = l & bit ? lanes + l : l + bit;
    }
    MK_UNROLL for (int i = 0; i < lanes; ++i) {
      if (i & bit) continue;
      const vuint a = rows[i], b = rows[i + bit];
      rows[i] = shuffle(a, b, first);
      rows[i + bit] = shuffle(a, b, second);
    }
  }
}

// Transposes the first `count` units of tile_columns rows, `stride` units apart, to rows of the right operand. Reads
// whole vectors.
inline void to_columns(const unit* rows, int64_t stride, int64_t count, unit* right) {
  for (int64_t k = 0; k < count; k += lanes) {
    for (int64_t j = 0; j < tile_columns; j += lanes) {
      vuint block[lanes];
      MK_UNROLL for (int i = 0; i < lanes; ++i) memcpy(&block[i], rows + (j + i) * stride + k, sizeof block[i]);
      transpose(block);
      MK_UNROLL for (int i = 0; i < lanes; ++i) {
        if (k + i < count) memcpy(right + (k + i) * tile_columns + j, &block[i], sizeof block[i]);
      }
    }
  }
}

// Sets a tile c, whose rows are `c_stride` apart, to a * b, or adds a * b to it. It is not inlined: among other code
// the compiler would not keep the sums in registers.
template <class Product, bool grows>
__attribute__((noinline)) void multiply(const unit* a, int64_t a_stride, const unit* b, int64_t depth, float* c,
                                        int64_t c_stride) {
  for (int64_t k = 0; k < depth; k += Product::chain) {
    Tile sum = {};
    add_product<Product>(a + k, a_stride, b + k * tile_columns, least(depth - k, Product::chain), sum);
    MK_UNROLL for (int m = 0; m < tile_rows; ++m) {
      MK_UNROLL for (int n = 0; n < tile_vectors; ++n) {
        float* const p = c + m * c_stride + n * lanes;
        store(p, grows || k > 0 ? load(p) + sum[m][n] : sum[m][n]);
      }
    }
  }
}

}  // namespace
