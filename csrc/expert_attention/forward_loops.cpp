// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "expert_attention/expert_attention_cpu.h"
#include "expert_attention/pack.h"

namespace {

// A block of keys and its values stay in the L2 cache while all panels of a group of queries look at it; so do the
// scores of a panel. By measurement; 2304 tokens are 6 blocks and 12 groups.
constexpr int panel_rows = 4 * tile_rows, key_block = 384;
static_assert(key_block % tile_columns == 0, "blocks of keys consist of whole tiles");
constexpr float log2e = 1.44269504f;

// The running softmax of one query: the largest score so far, and sums relative to it.
struct Running {
  float most;
  vfloat sum;
};

// Where things lie in the workspace: keys and values, and of a group of queries themselves and what they have summed
// up.
template <class Product>
struct Layout {
  int64_t keys, units, row_units, columns;  // L in whole tiles; D in units, also of a staged row; D in whole tiles

  Layout(int64_t L, int64_t D)
      : keys(round_up(L, tile_columns)),
        units((D + Product::depth - 1) / Product::depth),
        row_units(round_up(D, lanes) / Product::depth),
        columns(round_up(D, tile_columns)) {}

  int64_t value_step() const { return keys / Product::depth * tile_columns; }  // from column tile to column tile
  int64_t values() const { return keys * units; }
  int64_t queries() const { return values() + columns / tile_columns * value_step(); }
  int64_t out() const { return queries() + round_up(mk::query_group, tile_rows) * row_units; }
  int64_t running() const { return out() + round_up(mk::query_group, tile_rows) * columns; }
  int64_t bytes() const { return running() * (int64_t)sizeof(unit) + mk::query_group * (int64_t)sizeof(Running); }
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
}

inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

// The largest of n numbers, a multiple of `lanes`.
inline float largest(const float* p, int n) {
  vfloat even = load(p), odd = even;
  int j = lanes;
  for (; j + lanes < n; j += 2 * lanes) {
    even = larger(load(p + j), even);
    odd = larger(load(p + j + lanes), odd);
  }
  if (j < n) even = larger(load(p + j), even);
  even = larger(odd, even);
  typedef float four __attribute__((vector_size(16)));
  four quarter[lanes / 4];
  memcpy(quarter, &even, sizeof quarter);
  MK_UNROLL for (int i = 1; i < lanes / 4; ++i) quarter[0] = quarter[i] > quarter[0] ? quarter[i] : quarter[0];
  const float a = quarter[0][0] > quarter[0][1] ? quarter[0][0] : quarter[0][1];
  const float b = quarter[0][2] > quarter[0][3] ? quarter[0][2] : quarter[0][3];
  return a > b ? a : b;
}

// Scores to probabilities, relative to the largest score so far; rescales what was summed relative to a smaller one.
template <class Product>
inline void soften(float* scores, int n, float scale, Running& r, float* out, int64_t columns,
                   typename Product::element* probabilities) {
  const float most = largest(scores, n);
  if (most > r.most) {
    const vfloat factor = exp2(vfloat{} + (r.most - most) * scale);
    r.sum *= factor;
    for (int64_t c = 0; c < columns; c += lanes) store(out + c, load(out + c) * factor);
    r.most = most;
  }
  const vfloat shift = vfloat{} - r.most * scale;
  for (int j = 0; j < n; j += tile_columns) {
    vfloat v[tile_vectors];
    MK_UNROLL for (int i = 0; i < tile_vectors; ++i) v[i] = load(scores + j + i * lanes) * scale + shift;
    exp2(v);
    MK_UNROLL for (int i = 0; i < tile_vectors; ++i) {
      r.sum += v[i];
      Product::store(probabilities + j + i * lanes, v[i]);
    }
  }
}

// What `rows` queries, at most panel_rows, take from a block of keys.
template <class Product>
void attend(const mk::AttentionHead& h, const Layout<Product>& layout, const unit* keys, int64_t key,
            const unit* queries, int64_t rows, float* out, Running* running) {
  alignas(64) typename Product::element probabilities[panel_rows * key_block];
  alignas(64) float scores[panel_rows * key_block];
  const float scale = log2e / __builtin_sqrtf((float)h.D);
  const int n = (int)(layout.keys - key < key_block ? layout.keys - key : key_block);
  for (int j = 0; j < n; j += tile_columns) {
    for (int64_t i = 0; i < rows; i += tile_rows) {
      multiply<Product, false>(queries + i * layout.row_units, layout.row_units, keys + (key + j) * layout.units,
                               layout.units, scores + i * key_block + j, key_block);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = scores + i * key_block;
    for (int64_t j = h.L - key; j < n; ++j) row[j] = -__builtin_inff();
    soften<Product>(row, n, scale, running[i], out + i * layout.columns, layout.columns, probabilities + i * key_block);
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

template <class Format, class Product>
void rows(const mk::AttentionHead& h, void* workspace, int64_t first, int64_t end) {
  typedef typename Format::type type;
  const Layout<Product> layout(h.L, h.D);
  const unit* const keys = (const unit*)workspace;
  unit* const queries = (unit*)workspace + layout.queries();
  float* const out = (float*)((unit*)workspace + layout.out());
  Running* const running = (Running*)((unit*)workspace + layout.running());
  const int64_t count = end - first, whole = round_up(count, tile_rows);

  stage<Format, Product>({(const type*)h.q, h.q_stride, h.cos, h.sin}, first, whole, end, h.D,
                         (typename Product::element*)queries);
  memset(out, 0, whole * layout.columns * sizeof *out);
  for (int64_t i = 0; i < count; ++i) running[i] = {-__builtin_inff(), vfloat{}};
  for (int64_t key = 0; key < h.L; key += key_block) {
    for (int64_t i = 0; i < count; i += panel_rows) {
      attend<Product>(h, layout, keys, key, queries + i * layout.row_units,
                      count - i < panel_rows ? count - i : panel_rows, out + i * layout.columns, running + i);
    }
  }

  const float scale = log2e / __builtin_sqrtf((float)h.D);
  for (int64_t i = 0; i < count; ++i) {
    const float sum = total({running[i].sum});
    type* const dst = (type*)h.out + (first + i) * h.out_stride;
    for_lanes(h.D, [&](int64_t d, int count) __attribute__((always_inline)) {
      store<Format>(dst + d, count, load(out + i * layout.columns + d) / sum);
    });
    h.lse[first + i] = running[i].most * scale + __builtin_log2f(sum);
  }
}

template <class Format, class Product>
constexpr mk::AttentionForward loops = {workspace_bytes<Product>, pack<Format, Product>, rows<Format, Product>};

}  // namespace

extern const mk::AttentionForwardLoops MK_ISA_NAME(attention_forward_loops) = {loops<F32, F32Product>,
                                                                               loops<BF16InOrder, NarrowProduct>};
