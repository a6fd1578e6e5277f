// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "expert_attention/expert_attention_cpu.h"
#include "expert_attention/pack.h"

namespace {

// The scores of a panel of queries and a block of keys stay in the L1 and L2 caches. By measurement; 2304 is 6 blocks.
constexpr int panel_rows = 4 * tile_rows, key_block = 384;
static_assert(key_block % tile_columns == 0, "blocks of keys consist of whole tiles");
constexpr float log2e = 1.44269504f;

// Where keys and values lie in the workspace.
template <class Product>
struct Packed {
  int64_t keys, units, columns;  // L in whole tiles; a token's channels in units and, as columns, in whole tiles

  explicit Packed(const mk::AttentionHead& h) : Packed(h.L, h.D) {}
  Packed(int64_t L, int64_t D)
      : keys(round_up(L, tile_columns)),
        units((D + Product::depth - 1) / Product::depth),
        columns(round_up(D, tile_columns)) {}

  int64_t value_offset() const { return keys * units; }
  int64_t value_step() const { return keys / Product::depth * tile_columns; }  // from column tile to column tile
  int64_t bytes() const { return (value_offset() + columns / tile_columns * value_step()) * (int64_t)sizeof(unit); }
};

template <class Product>
int64_t workspace_bytes(int64_t L, int64_t D) {
  return Packed<Product>(L, D).bytes();
}

template <class Format, class Product>
void pack(const mk::AttentionHead& h, void* workspace) {
  typedef typename Format::type type;
  const Packed<Product> packed(h);
  unit* const memory = (unit*)workspace;
  pack_columns<Format, Product>({(const type*)h.k, h.k_stride, h.cos, h.sin}, h.L, packed.keys, h.D, memory);
  pack_depth<Format, Product>({(const type*)h.v, h.v_stride, nullptr, nullptr}, h.L, packed.keys, h.D,
                              memory + packed.value_offset());
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

// The running softmax of one query: the largest score so far, and sums relative to it.
struct Running {
  float most;
  vfloat sum;
};

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

template <class Format, class Product>
void panel(const mk::AttentionHead& h, const Packed<Product>& packed, const unit* keys, int64_t first, int64_t end) {
  typedef typename Product::element element;
  typedef typename Format::type type;
  alignas(64) element queries[panel_rows * mk::max_head_width];
  alignas(64) element probabilities[panel_rows * key_block];
  alignas(64) float scores[panel_rows * key_block];
  alignas(64) float out[panel_rows * mk::max_head_width];
  const unit* const values = keys + packed.value_offset();
  const int64_t query_units = round_up(h.D, lanes) / Product::depth, columns = packed.columns;
  const int64_t rows = end - first, whole = round_up(rows, tile_rows);
  const float scale = log2e / __builtin_sqrtf((float)h.D);

  stage<Format, Product>({(const type*)h.q, h.q_stride, h.cos, h.sin}, first, whole, end, h.D, queries);
  memset(out, 0, whole * columns * sizeof *out);
  Running running[panel_rows];
  for (int64_t i = 0; i < whole; ++i) running[i] = {-__builtin_inff(), vfloat{}};

  for (int64_t key = 0; key < h.L; key += key_block) {
    const int n = (int)(packed.keys - key < key_block ? packed.keys - key : key_block);
    for (int j = 0; j < n; j += tile_columns) {
      for (int64_t i = 0; i < whole; i += tile_rows) {
        multiply<Product, false>((const unit*)queries + i * query_units, query_units, keys + (key + j) * packed.units,
                                 packed.units, scores + i * key_block + j, key_block);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* const row = scores + i * key_block;
      for (int64_t j = h.L - key; j < n; ++j) row[j] = -__builtin_inff();
      soften<Product>(row, n, scale, running[i], out + i * columns, columns, probabilities + i * key_block);
    }
    const int64_t depth = n / Product::depth, row_units = key_block / Product::depth;
    for (int64_t c = 0; c < columns; c += tile_columns) {
      const unit* const block = values + c / tile_columns * packed.value_step() + key / Product::depth * tile_columns;
      for (int64_t i = 0; i < whole; i += tile_rows) {
        multiply<Product, true>((const unit*)probabilities + i * row_units, row_units, block, depth,
                                out + i * columns + c, columns);
      }
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const float sum = total({running[i].sum});
    type* const dst = (type*)h.out + (first + i) * h.out_stride;
    for_lanes(h.D, [&](int64_t d, int count) __attribute__((always_inline)) {
      store<Format>(dst + d, count, load(out + i * columns + d) / sum);
    });
    h.lse[first + i] = running[i].most * scale + __builtin_log2f(sum);
  }
}

template <class Format, class Product>
void rows(const mk::AttentionHead& h, const void* workspace, int64_t first, int64_t end) {
  const Packed<Product> packed(h);
  for (; first < end; first += panel_rows) {
    const int64_t panel_end = end - first < panel_rows ? end : first + panel_rows;
    panel<Format, Product>(h, packed, (const unit*)workspace, first, panel_end);
  }
}

template <class Format, class Product>
constexpr mk::AttentionForward loops = {workspace_bytes<Product>, pack<Format, Product>, rows<Format, Product>};

}  // namespace

extern const mk::AttentionForwardLoops MK_ISA_NAME(attention_forward_loops) = {loops<F32, F32Product>,
                                                                               loops<BF16InOrder, NarrowProduct>};
