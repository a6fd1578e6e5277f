// Compiled once per instruction set; see common/simd.h for what that forbids.
//
// With S = scale * Q K^T, P = softmax(S) and dP = G V^T:  dV = P^T G,  dS = P * (dP - rowsum(G * out)),
// dK = scale * dS^T Q,  dQ = scale * dS K. Blocks of S^T, with keys as rows, are computed again, and P^T from them and
// the saved log-sum-exps: P^T and dS^T are then left operands as they are, and dQ^T = K^T dS^T takes the same dS^T as
// its right operand.
#include "common/cpu.h"
#include "expert_attention/expert_attention_cpu.h"
#include "expert_attention/pack.h"

namespace {

// The operands and gradients of a block of keys stay in the L2 cache.
constexpr int64_t key_block = 16 * tile_rows, query_block = 64;
static_assert(query_block % tile_columns == 0, "blocks of queries consist of whole tiles");

// Sizes in the workspace. As in pack.h, a unit has `depth` elements.
template <class Product>
struct Layout {
  static constexpr int depth = Product::depth;
  // L in whole blocks of queries; D in units; a staged row in units; D in whole tiles of columns and of rows.
  int64_t queries, units, row_units, columns, rows;

  Layout(int64_t L, int64_t D)
      : queries(round_up(L, query_block)),
        units((D + depth - 1) / depth),
        row_units(round_up(D, lanes) / depth),
        columns(round_up(D, tile_columns)),
        rows(round_up(D, tile_rows)) {}

  // In units: Q^T and G^T; Q and G; staged keys and values; K^T; P^T and dS^T; gradients of keys and values.
  int64_t by_column() const { return queries * units; }
  int64_t by_depth() const { return queries / depth * columns; }
  int64_t staged() const { return key_block * row_units; }
  int64_t transposed() const { return rows * key_block / depth; }
  int64_t block() const { return key_block * query_block / depth; }
  int64_t gradient() const { return key_block * columns; }
  int64_t part() const { return queries * rows; }

  int64_t bytes() const {
    return (2 * (by_column() + by_depth() + queries + staged() + gradient()) + transposed() + 3 * block()) *
           (int64_t)sizeof(unit);
  }
};

template <class Product>
int64_t workspace_bytes(int64_t L, int64_t D) {
  return Layout<Product>(L, D).bytes();
}

template <class Product>
int64_t part_size(int64_t L, int64_t D) {
  return Layout<Product>(L, D).part();
}

// Divides the workspace.
struct Cursor {
  char* next;
  template <class T = unit>
  T* take(int64_t units) {
    T* const p = (T*)next;
    next += units * (int64_t)sizeof(unit);
    return p;
  }
};

// out[t] is the dot product of row t of x and row t of y.
template <class Format>
void row_dots(const typename Format::type* x, int64_t x_stride, const typename Format::type* y, int64_t y_stride,
              int64_t L, int64_t D, float* out) {
  for (int64_t t = 0; t < L; ++t) {
    vfloat sum[1] = {};
    for_each_register<F32>(D, [&](int64_t d, int count) MK_ALWAYS_INLINE {
      sum[0] += load<Format>(x + t * x_stride + d, count) * load<Format>(y + t * y_stride + d, count);
    });
    out[t] = total(sum);
  }
}

// Row d of dst holds channel d of `key_block` staged rows.
template <class Product>
void transpose(const typename Product::element* rows, int64_t width, int64_t D, typename Product::element* dst) {
  for (int64_t d = 0; d < D; ++d, dst += key_block) {
    for (int64_t i = 0; i < key_block; ++i) dst[i] = rows[i * width + d];
  }
}

// Turns tiles of S^T and dP^T into tiles of P^T and dS^T. dS^T is written as a left operand and, where its units
// differ, as a right operand too. Rows from `real` on become zeros.
template <class Product>
inline void softmax_grad(const float* scores, const float* grad_p, const float* lse, const float* delta, float scale,
                         int64_t real, typename Product::element* p, typename Product::element* ds, unit* ds_right) {
  constexpr int depth = Product::depth;
  for (int m = 0; m < tile_rows; m += depth) {
    vfloat gradient[depth][tile_vectors];
    MK_UNROLL for (int i = 0; i < depth; ++i) {
      const int64_t row = (m + i) * tile_columns;
      vfloat v[tile_vectors];
      MK_UNROLL for (int n = 0; n < tile_vectors; ++n) {
        v[n] = load(scores + row + n * lanes) * scale - load(lse + n * lanes);
      }
      exp2<Product::coarse>(v);
      MK_UNROLL for (int n = 0; n < tile_vectors; ++n) {
        if (m + i >= real) v[n] = vfloat{};
        gradient[i][n] = v[n] * (load(grad_p + row + n * lanes) - load(delta + n * lanes));
        Product::store(p + row + n * lanes, v[n]);
        Product::store(ds + row + n * lanes, gradient[i][n]);
      }
    }
    if constexpr (depth > 1) {
      MK_UNROLL for (int n = 0; n < tile_vectors; ++n) {
        Product::store_units(ds_right + m / depth * tile_columns + n * lanes, gradient[0][n], gradient[1][n]);
      }
    }
  }
}

// Writes rows of fp32 sums to a gradient, rotated back if there are tables. Returns whether all of them are finite.
template <class Format>
bool store_rows(const float* sums, int64_t sums_stride, int64_t rows, int64_t D, float scale, const float* cos,
                const float* sin, typename Format::type* dst, int64_t stride) {
  vfloat zeros[1] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for_each_register<F32>(D, [&](int64_t d, int count) MK_ALWAYS_INLINE {
      vfloat v = load<F32>(sums + i * sums_stride + d, count) * scale;
      if (cos) v = rotate<true>(v, load<F32>(cos + i * D + d, count), load<F32>(sin + i * D + d, count));
      zeros[0] += v * 0;
      store<Format>(dst + i * stride + d, count, v);
    });
  }
  return total(zeros) == 0;
}

// Whether probabilities can be computed again from the log-sum-exps. NaN passes: it comes from an input and belongs in
// the gradients.
inline bool in_range(const float* lse, int64_t count) {
  float max = 0;
  for (int64_t t = 0; t < count; ++t) max = __builtin_fabsf(lse[t]) > max ? __builtin_fabsf(lse[t]) : max;
  return max <= mk::largest_lse;
}

template <class Format, class Product>
mk::AttentionOutcome keys(const mk::AttentionGradients& g, void* workspace, int64_t begin, int64_t end, float* part) {
  typedef typename Format::type type;
  typedef typename Product::element element;
  constexpr int depth = Product::depth, tile_units = tile_columns / depth;
  const mk::AttentionHead& h = g.head;
  const int64_t L = h.L, D = h.D;
  const Layout<Product> layout(L, D);
  const float root = 1 / __builtin_sqrtf((float)D), scale = log2e * root;
  if (!in_range(h.lse, L)) return mk::out_of_range;

  Cursor cursor{(char*)workspace};
  unit* const q_columns = cursor.take(layout.by_column());
  unit* const g_columns = cursor.take(layout.by_column());
  unit* const q_depth = cursor.take(layout.by_depth());
  unit* const g_depth = cursor.take(layout.by_depth());
  float* const lse = cursor.take<float>(layout.queries);
  float* const delta = cursor.take<float>(layout.queries);
  element* const k_rows = cursor.take<element>(layout.staged());
  element* const v_rows = cursor.take<element>(layout.staged());
  element* const k_transposed = cursor.take<element>(layout.transposed());
  element* const p = cursor.take<element>(layout.block());
  element* const ds = cursor.take<element>(layout.block());
  unit* const ds_right = cursor.take(layout.block());
  float* const dk = cursor.take<float>(layout.gradient());
  float* const dv = cursor.take<float>(layout.gradient());

  const Rows<Format> query{(const type*)h.q, h.q_stride, h.cos, h.sin};
  const Rows<Format> grad{(const type*)g.grad, g.grad_stride, nullptr, nullptr};
  pack_columns<Format, Product>(query, L, layout.queries, D, q_columns);
  pack_columns<Format, Product>(grad, L, layout.queries, D, g_columns);
  pack_depth<Format, Product>(query, L, layout.queries, D, q_depth);
  pack_depth<Format, Product>(grad, L, layout.queries, D, g_depth);
  memcpy(lse, h.lse, L * sizeof *lse);
  row_dots<Format>((const type*)g.grad, g.grad_stride, (const type*)h.out, h.out_stride, L, D, delta);
  for (int64_t t = L; t < layout.queries; ++t) lse[t] = delta[t] = 0;  // padding
  memset(part, 0, layout.part() * sizeof *part);
  memset(k_transposed, 0, layout.transposed() * sizeof(unit));
  const float longest_query = longest_column<Product>(q_columns, layout.queries, layout.units);
  bool all_finite = true;

  for (int64_t key = begin; key < end; key += key_block) {
    const int64_t valid = end - key < key_block ? end - key : key_block, whole = round_up(valid, tile_rows);
    stage<Format, Product>({(const type*)h.k, h.k_stride, h.cos, h.sin}, key, key_block, end, D, k_rows);
    if (!holds_scores(longest_query * longest_row<Product>((const unit*)k_rows, valid, layout.row_units))) {
      return mk::out_of_range;
    }
    stage<Format, Product>({(const type*)h.v, h.v_stride, nullptr, nullptr}, key, whole, end, D, v_rows);
    transpose<Product>(k_rows, layout.row_units * depth, D, k_transposed);
    memset(dk, 0, layout.gradient() * sizeof *dk);
    memset(dv, 0, layout.gradient() * sizeof *dv);

    for (int64_t first = 0; first < layout.queries; first += query_block) {
      for (int64_t t = 0; t < query_block; t += tile_columns) {
        const int64_t query_units = (first + t) * layout.units;
        for (int64_t i = 0; i < whole; i += tile_rows) {
          alignas(64) float scores[tile_rows * tile_columns], grad_p[tile_rows * tile_columns];
          const int64_t offset = (t / tile_columns * key_block + i) * tile_columns;
          multiply<Product, false>((const unit*)k_rows + i * layout.row_units, layout.row_units,
                                   q_columns + query_units, layout.units, scores, tile_columns);
          multiply<Product, false>((const unit*)v_rows + i * layout.row_units, layout.row_units,
                                   g_columns + query_units, layout.units, grad_p, tile_columns);
          const int64_t real = valid - i < tile_rows ? valid - i : tile_rows;  // the others are padding
          softmax_grad<Product>(scores, grad_p, lse + first + t, delta + first + t, scale, real, p + offset,
                                ds + offset, ds_right + offset / depth);
        }
      }
      const unit* const right = depth > 1 ? ds_right : (const unit*)ds;

      for (int64_t c = 0; c < layout.columns; c += tile_columns) {
        const int64_t column =
            c / tile_columns * (layout.queries / depth * tile_columns) + first / depth * tile_columns;
        for (int64_t i = 0; i < whole; i += tile_rows) {
          const int64_t offset = i * layout.columns + c;
          for (int64_t t = 0; t < query_block / tile_columns; ++t) {
            const int64_t left = (t * key_block + i) * tile_units, right = column + t * tile_units * tile_columns;
            multiply<Product, true>((const unit*)p + left, tile_units, g_depth + right, tile_units, dv + offset,
                                    layout.columns);
            multiply<Product, true>((const unit*)ds + left, tile_units, q_depth + right, tile_units, dk + offset,
                                    layout.columns);
          }
        }
      }
      for (int64_t t = 0; t < query_block / tile_columns; ++t) {
        float* const of_q = part + (first / tile_columns + t) * layout.rows * tile_columns;
        for (int64_t d = 0; d < layout.rows; d += tile_rows) {
          multiply<Product, true>((const unit*)k_transposed + d * key_block / depth, key_block / depth,
                                  right + t * key_block / depth * tile_columns, whole / depth, of_q + d * tile_columns,
                                  tile_columns);
        }
      }
    }

    all_finite &= store_rows<Format>(dk, layout.columns, valid, D, root, h.cos + key * D, h.sin + key * D,
                                     (type*)g.grad_k + key * h.out_stride, h.out_stride);
    all_finite &= store_rows<Format>(dv, layout.columns, valid, D, 1, nullptr, nullptr,
                                     (type*)g.grad_v + key * h.out_stride, h.out_stride);
  }
  return all_finite ? mk::finite : mk::not_finite;
}

template <class Format, class Product>
mk::AttentionOutcome queries(const mk::AttentionGradients& g, const float* part, int64_t parts) {
  typedef typename Format::type type;
  alignas(64) float rows[tile_columns * MK_MAX_HEAD_WIDTH];
  const mk::AttentionHead& h = g.head;
  const Layout<Product> layout(h.L, h.D);
  bool all_finite = true;
  for (int64_t t = 0; t < h.L; t += tile_columns, part += layout.rows * tile_columns) {
    for (int64_t d = 0; d < h.D; ++d) {
      for (int j = 0; j < tile_columns; ++j) {
        float sum = 0;
        for (int64_t i = 0; i < parts; ++i) sum += part[i * layout.part() + d * tile_columns + j];
        rows[j * h.D + d] = sum;
      }
    }
    const int64_t count = h.L - t < tile_columns ? h.L - t : tile_columns;
    all_finite &= store_rows<Format>(rows, h.D, count, h.D, 1 / __builtin_sqrtf((float)h.D), h.cos + t * h.D,
                                     h.sin + t * h.D, (type*)g.grad_q + t * h.out_stride, h.out_stride);
  }
  return all_finite ? mk::finite : mk::not_finite;
}

template <class Format, class Product>
constexpr mk::AttentionBackward loops = {workspace_bytes<Product>, part_size<Product>, keys<Format, Product>,
                                         queries<Format, Product>};

}  // namespace

extern const mk::AttentionBackwardLoops MK_ISA_NAME(attention_backward_loops) = {loops<F32, F32Product>,
                                                                                 loops<BF16InOrder, NarrowProduct>};
