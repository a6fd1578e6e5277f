// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "expert_attention/expert_attention_cpu.h"
#include "expert_attention/pack.h"

namespace {

// A block of keys and its values stay in the L2 cache while all panels of a group of queries use it. Both sizes are
// measured; 2304 tokens are 6 blocks and 12 groups.
constexpr int panel_rows = 4 * tile_rows, key_block = 384;
static_assert(key_block % tile_columns == 0, "blocks of keys consist of whole tiles");

// The probability of a score is 2^(score - shift), with scores in powers of 2, and is normalised only at the end. The
// usual shift, the row max, costs a pass over all scores; any shift near it keeps probabilities and sums in the range
// of fp32. The shift is 0 where the lengths of queries and keys bound the scores by `harmless`. Elsewhere it is the max
// over the first tile of keys, and the row max if a sum turns out to be `too_large`, or `too_small` for probabilities
// times values.
constexpr float harmless = 48, too_large = 0x1p64f, too_small = 0x1p-24f;

// Offsets in the workspace: keys, values, the length of the longest key; and of a group of queries the queries, their
// shifts, the sums of their probabilities (a vector each) and their sums of values.
template <class Product>
struct Layout {
  int64_t keys, units, row_units, columns;  // L in whole tiles; D in units; a staged row in units; D in whole tiles

  Layout(int64_t L, int64_t D)
      : keys(round_up(L, tile_columns)),
        units((D + Product::depth - 1) / Product::depth),
        row_units(round_up(D, lanes) / Product::depth),
        columns(round_up(D, tile_columns)) {}

  int64_t value_step() const { return keys / Product::depth * tile_columns; }  // from column tile to column tile
  int64_t values() const { return keys * units; }
  int64_t longest() const { return values() + columns / tile_columns * value_step(); }
  int64_t queries() const { return longest() + lanes; }
  int64_t shifts() const { return queries() + group * row_units; }
  int64_t sums() const { return shifts() + round_up(group, lanes); }
  int64_t out() const { return sums() + group * lanes; }
  int64_t bytes() const { return (out() + group * columns) * (int64_t)sizeof(unit); }

  static constexpr int64_t group = round_up(mk::query_group, tile_rows);
};

template <class Product>
int64_t workspace_bytes(int64_t L, int64_t D) {
  return Layout<Product>(L, D).bytes();
}

template <class Format, class Product>
void pack(const mk::AttentionHead& h, void* workspace) {
  typedef typename Format::type type;
  const Layout<Product> layout(h.L, h.D);
  unit* const memory = (unit*)workspace;
  pack_columns<Format, Product>({(const type*)h.k, h.k_stride, h.cos, h.sin}, h.L, layout.keys, h.D, memory);
  pack_depth<Format, Product>({(const type*)h.v, h.v_stride, nullptr, nullptr}, h.L, layout.keys, h.D,
                              memory + layout.values());
  *(float*)(memory + layout.longest()) = longest_column<Product>(memory, layout.keys, layout.units);
}

// Computes the probabilities of a tile of scores and adds those of the first `valid` keys to the sums of the queries.
// It is not inlined: among other code the compiler would not keep the scores in registers.
template <class Product>
__attribute__((noinline)) void softmax_tile(const unit* queries, int64_t query_stride, const unit* keys, int64_t units,
                                            float scale, const float* shifts, int64_t valid,
                                            typename Product::element* probabilities, vfloat* sums) {
  const vuint lane = lane_numbers();
  Tile scores = {};
  add_product<Product>(queries, query_stride, keys, units, scores);
  MK_UNROLL for (int m = 0; m < tile_rows; ++m) {
    const vfloat shift = vfloat{} + shifts[m];
    MK_UNROLL for (int n = 0; n < tile_vectors; ++n) scores[m][n] = scores[m][n] * scale - shift;
    exp2<Product::coarse>(scores[m]);
    if (valid < tile_columns) {
      MK_UNROLL for (int n = 0; n < tile_vectors; ++n) {
        scores[m][n] = lane + (uint32_t)(n * lanes) < vuint{} + (uint32_t)valid ? scores[m][n] : vfloat{};
      }
    }
    vfloat sum = scores[m][0];
    MK_UNROLL for (int n = 1; n < tile_vectors; ++n) sum += scores[m][n];
    sums[m] += sum;
    MK_UNROLL for (int n = 0; n < tile_vectors; ++n) {
      Product::store(probabilities + m * key_block + n * lanes, scores[m][n]);
    }
  }
}

// Adds the values of a block of keys to the results of `rows` queries, at most panel_rows.
template <class Product>
void attend(const mk::AttentionHead& h, const Layout<Product>& layout, const unit* keys, int64_t key,
            const unit* queries, int64_t rows, const float* shifts, vfloat* sums, float* out) {
  alignas(64) typename Product::element probabilities[panel_rows * key_block];
  const float scale = log2e / __builtin_sqrtf((float)h.D);
  const int64_t n = least(layout.keys - key, key_block);
  for (int64_t j = 0; j < n; j += tile_columns) {
    for (int64_t i = 0; i < rows; i += tile_rows) {
      softmax_tile<Product>(queries + i * layout.row_units, layout.row_units, keys + (key + j) * layout.units,
                            layout.units, scale, shifts + i, h.L - key - j, probabilities + i * key_block + j,
                            sums + i);
    }
  }
  const unit* const values = keys + layout.values() + key / Product::depth * tile_columns;
  for (int64_t c = 0; c < layout.columns; c += tile_columns) {
    for (int64_t i = 0; i < rows; i += tile_rows) {
      multiply<Product, true>((const unit*)(probabilities + i * key_block), key_block / Product::depth,
                              values + c / tile_columns * layout.value_step(), n / Product::depth,
                              out + i * layout.columns + c, layout.columns);
    }
  }
}

// Computes the sums of `count` queries over all keys.
template <class Product>
void attend_all(const mk::AttentionHead& h, const Layout<Product>& layout, unit* memory, int64_t count) {
  const int64_t whole = round_up(count, tile_rows);
  const unit* const queries = memory + layout.queries();
  const float* const shifts = (const float*)(memory + layout.shifts());
  vfloat* const sums = (vfloat*)(memory + layout.sums());
  float* const out = (float*)(memory + layout.out());
  memset(sums, 0, whole * sizeof *sums);
  memset(out, 0, whole * layout.columns * sizeof *out);
  for (int64_t key = 0; key < h.L; key += key_block) {
    for (int64_t i = 0; i < count; i += panel_rows) {
      attend<Product>(h, layout, memory, key, queries + i * layout.row_units, least(count - i, panel_rows), shifts + i,
                      sums + i, out + i * layout.columns);
    }
  }
}

// Finds the max score of each of `tile_rows` queries over the first `count` keys.
template <class Product>
void find_row_max(const Layout<Product>& layout, const unit* keys, int64_t count, const unit* queries, float scale,
                  float* row_max) {
  vfloat lane_max[tile_rows];
  for (int m = 0; m < tile_rows; ++m) lane_max[m] = vfloat{} - __builtin_inff();
  for (int64_t key = 0; key < count; key += tile_columns) {
    alignas(64) float scores[tile_rows * tile_columns];
    multiply<Product, false>(queries, layout.row_units, keys + key * layout.units, layout.units, scores, tile_columns);
    for (int m = 0; m < tile_rows; ++m) {
      float* const row = scores + m * tile_columns;
      for (int64_t j = count - key; j < tile_columns; ++j) row[j] = row[0];  // padding
      for (int n = 0; n < tile_columns; n += lanes) lane_max[m] = max(load(row + n), lane_max[m]);
    }
  }
  for (int m = 0; m < tile_rows; ++m) row_max[m] = max_lane(lane_max[m]) * scale;
}

template <class Format, class Product>
int64_t rows(const mk::AttentionHead& h, void* workspace, int64_t first, int64_t end, int64_t* wide) {
  typedef typename Format::type type;
  typedef typename Product::element element;
  const Layout<Product> layout(h.L, h.D);
  unit* const memory = (unit*)workspace;
  unit* const queries = memory + layout.queries();
  float* const shifts = (float*)(memory + layout.shifts());
  const vfloat* const sums = (const vfloat*)(memory + layout.sums());
  const float* const out = (const float*)(memory + layout.out());
  const float longest = *(const float*)(memory + layout.longest()), scale = log2e / __builtin_sqrtf((float)h.D);
  const int64_t count = end - first, whole = round_up(count, tile_rows);
  int64_t num_wide = 0;

  stage<Format, Product>({(const type*)h.q, h.q_stride, h.cos, h.sin}, first, whole, end, h.D, (element*)queries);
  const float squares = longest_row<Product>(queries, count, layout.row_units) * longest;
  if (!holds_scores(squares)) {
    for (int64_t i = first; i < end; ++i) wide[num_wide++] = i;
    return num_wide;
  }
  const float bound = squares * scale * scale;
  const bool bounded = bound <= mk::largest_lse * mk::largest_lse;
  bool done = false;
  for (int64_t seen = bound <= harmless * harmless ? 0 : least(tile_columns, h.L); !done; seen = h.L) {
    memset(shifts, 0, whole * sizeof *shifts);
    for (int64_t i = 0; seen > 0 && i < whole; i += tile_rows) {
      find_row_max(layout, memory, seen, queries + i * layout.row_units, scale, shifts + i);
    }
    attend_all(h, layout, memory, count);
    done = true;
    for (int64_t i = 0; seen < h.L && i < count; ++i) {
      const float sum = total({sums[i]});
      done &= !(sum > too_large || sum < too_small);
    }
  }

  for (int64_t i = 0; i < count; ++i) {
    const float sum = total({sums[i]});
    type* const dst = (type*)h.out + (first + i) * h.out_stride;
    vfloat zeros[1] = {};
    for_each_register<F32>(h.D, [&](int64_t d, int count) MK_ALWAYS_INLINE {
      const vfloat v = load(out + i * layout.columns + d);
      zeros[0] += v * 0;
      store<Format>(dst + d, count, v / sum);
    });
    const float lse = shifts[i] + __builtin_log2f(sum);
    h.lse[first + i] = lse;
    // Bounded scores have a log-sum-exp within the range, or are NaN because an input is NaN.
    const bool in_range = __builtin_fabsf(lse) <= mk::largest_lse;
    if (in_range ? total(zeros) != 0 : !bounded) wide[num_wide++] = first + i;
  }
  return num_wide;
}

template <class Format, class Product>
constexpr mk::AttentionForward loops = {workspace_bytes<Product>, pack<Format, Product>, rows<Format, Product>};

}  // namespace

extern const mk::AttentionForwardLoops MK_ISA_NAME(attention_forward_loops) = {loops<F32, F32Product>,
                                                                               loops<BF16InOrder, NarrowProduct>};
