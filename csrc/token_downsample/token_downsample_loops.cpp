// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/layer_norm.h"
#include "token_downsample/token_downsample_cpu.h"

namespace {

using mk::StageLine;

constexpr int64_t max_vectors = MK_MAX_NORM_CHANNELS / lanes;

inline vfloat load(const float* p, int64_t c, int count) { return load<F32>(p + c, count); }

inline void add(float* p, int64_t c, int count, vfloat v) { store<F32>(p + c, count, load<F32>(p + c, count) + v); }

// A token in fp32 with its mean and 1 / sqrt(variance + eps).
struct Token {
  vfloat value[max_vectors];
  float mean, rstd;

  inline vfloat normed(int64_t c) const { return (at(value, c) - mean) * rstd; }
};

// Needs a token's values, with zeros behind the last channel, and their sum.
template <class Format>
MK_INLINE void find_moments(Token& t, const vfloat (&sum)[sums], int64_t C, float eps) {
  const Moments m = moments<Format>(t.value, sum, C);
  t.mean = m.mean + m.correction;
  t.rstd = inverse_deviation(m.variance, eps);
}

template <class Format>
inline void load_token(const typename Format::type* x, int64_t C, float eps, Token& t) {
  vfloat sum[sums] = {};
  for_each_summand<Format>(
      C, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE { sum[k] += at(t.value, c) = load<Format>(x + c, count); });
  find_moments<Format>(t, sum, C, eps);
}

inline vfloat affine(const StageLine& line, const Token& t, int64_t c, int count) {
  return t.normed(c) * load(line.weight, c, count) + load(line.bias, c, count);
}

// Finds the nine neighbours of a pixel; those outside of the grid are `zeros`.
template <class T>
inline void find_neighbours(const StageLine& line, const T* x, int64_t column, const T* zeros, const T* (&there)[9]) {
  for (int k = 0; k < 9; ++k) {
    const int64_t i = line.line + k / 3 - 1, j = column + k % 3 - 1;
    const bool inside = 0 <= i && i < line.R && 0 <= j && j < line.R;
    there[k] = inside ? x + (i * line.R + j) * line.C : zeros;
  }
}

template <class Format>
void norm_silu(const StageLine& line) {
  Token t;
  for (int64_t j = 0; j < line.R; ++j) {
    const int64_t offset = (line.line * line.R + j) * line.C;
    auto* const y = static_cast<typename Format::type*>(line.y) + offset;
    load_token<Format>(static_cast<const typename Format::type*>(line.x) + offset, line.C, line.eps, t);
    for_each_register<Format>(line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      const vfloat v = affine(line, t, c, count), silu = v * sigmoid(v);
      store<Format>(y + c, count, line.gate ? silu * load(line.gate, c, count) : silu);
    });
  }
}

template <class Format>
void conv(const StageLine& line) {
  typedef typename Format::type type;
  type zeros[MK_MAX_NORM_CHANNELS];
  memset(zeros, 0, line.C * sizeof *zeros);
  memset(line.sums, 0, line.C * sizeof *line.sums);
  Token t;
  for (int64_t j = 0; j < line.R; ++j) {
    type* const y = static_cast<type*>(line.y) + (line.line * line.R + j) * line.C;
    const type* there[9];
    find_neighbours(line, static_cast<const type*>(line.x), j, zeros, there);
    vfloat sum[sums] = {};
    for_each_summand<Format>(line.C, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
      vfloat v = {};
      MK_UNROLL for (int k = 0; k < 9; ++k) {
        v += load<Format>(there[k] + c, count) * load(line.taps + k * line.C, c, count);
      }
      sum[k] += at(t.value, c) = v;
      store<Format>(y + c, count, v);
    });
    find_moments<Format>(t, sum, line.C, line.eps);
    for_each_register<Format>(line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      const vfloat v = affine(line, t, c, count);
      add(line.sums, c, count, v * sigmoid(v));
    });
  }
}

template <class Format>
void norm_add(const StageLine& line) {
  typedef typename Format::type type;
  const int64_t step = line.window == 1 ? 1 : 2, side = line.R / step;
  const float share = 1.0f / (float)(line.window * line.window);
  Token t;
  vfloat window[max_vectors];
  for (int64_t j = 0; j < side; ++j) {
    type* const y = static_cast<type*>(line.y) + (line.line * side + j) * line.C;
    for_each_register<Format>(line.C, [&](int64_t c, int) MK_ALWAYS_INLINE { at(window, c) = vfloat{}; });
    for (int64_t k = 0; k < line.window * line.window; ++k) {
      const int64_t token = (line.line * step + k / line.window) * line.R + j * step + k % line.window;
      const type* const outer = static_cast<const type*>(line.outer) + token * line.outer_stride_token;
      load_token<Format>(static_cast<const type*>(line.x) + token * line.C, line.C, line.eps, t);
      for_each_register<Format>(line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
        at(window, c) += affine(line, t, c, count) + load<Format>(outer + c, count);
      });
    }
    for_each_register<Format>(
        line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE { store<Format>(y + c, count, at(window, c) * share); });
  }
}

// Writes the gradient of LN's input, given `grad` of its output (zeros behind the last channel), and adds to the
// gradients of weight and bias.
template <class Format>
inline void store_norm_grad(const StageLine& line, const Token& t, const vfloat* grad, typename Format::type* y) {
  NormGradient gradient;
  for_each_summand<Format>(line.C, [&](int64_t c, int count, int k) MK_ALWAYS_INLINE {
    const vfloat g = at(grad, c), n = t.normed(c);
    gradient.add(g * load(line.weight, c, count), n, k);
    add(line.sums, c, count, g * n);
    add(line.sums + line.C, c, count, g);
  });
  gradient.finish(line.C);
  for_each_register<Format>(line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
    const vfloat weighted = at(grad, c) * load(line.weight, c, count);
    store<Format>(y + c, count, gradient.of_input(weighted, t.normed(c), t.rstd));
  });
}

// Adds the gradients of all windows that contain pixel (line, column) to `grad`.
template <class Format>
inline void add_from_windows(const StageLine& line, int64_t column, vfloat* grad) {
  const int64_t step = line.window == 1 ? 1 : 2, side = line.R / step;
  const float share = 1.0f / (float)(line.window * line.window);
  // Windows of 3 overlap: they may share their first and last row and column.
  const int64_t shared = line.window == 3 ? 2 : 1;
  for (int64_t k = 0; k < shared * shared; ++k) {
    const int64_t i = line.line / step - k / shared, j = column / step - k % shared;
    const bool inside_i = 0 <= i && i < side && line.line < i * step + line.window;
    const bool inside_j = 0 <= j && j < side && column < j * step + line.window;
    if (!inside_i || !inside_j) continue;
    const auto* const outer =
        static_cast<const typename Format::type*>(line.outer) + (i * side + j) * line.outer_stride_token;
    for_each_register<Format>(
        line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE { at(grad, c) += load<Format>(outer + c, count) * share; });
  }
}

template <class Format>
void norm_add_bwd(const StageLine& line) {
  typedef typename Format::type type;
  memset(line.sums, 0, 2 * line.C * sizeof *line.sums);
  Token t;
  vfloat grad[max_vectors];
  for (int64_t j = 0; j < line.R; ++j) {
    const int64_t offset = (line.line * line.R + j) * line.C;
    for_each_register<Format>(line.C, [&](int64_t c, int) MK_ALWAYS_INLINE { at(grad, c) = vfloat{}; });
    add_from_windows<Format>(line, j, grad);
    load_token<Format>(static_cast<const type*>(line.x) + offset, line.C, line.eps, t);
    store_norm_grad<Format>(line, t, grad, static_cast<type*>(line.y) + offset);
  }
}

template <class Format>
void add_bwd(const StageLine& line) {
  vfloat grad[max_vectors];
  for (int64_t j = 0; j < line.R; ++j) {
    auto* const y = static_cast<typename Format::type*>(line.y) + (line.line * line.R + j) * line.C;
    for_each_register<Format>(line.C,
                              [&](int64_t c, int count) MK_ALWAYS_INLINE { at(grad, c) = load<Format>(y + c, count); });
    add_from_windows<Format>(line, j, grad);
    for_each_register<Format>(line.C,
                              [&](int64_t c, int count) MK_ALWAYS_INLINE { store<Format>(y + c, count, at(grad, c)); });
  }
}

template <class Format>
void gate_bwd(const StageLine& line) {
  typedef typename Format::type type;
  memset(line.sums, 0, line.C * sizeof *line.sums);
  Token t;
  for (int64_t j = 0; j < line.R; ++j) {
    const int64_t offset = (line.line * line.R + j) * line.C;
    const type* const grad = static_cast<const type*>(line.grad) + offset;
    type* const y = static_cast<type*>(line.y) + offset;
    load_token<Format>(static_cast<const type*>(line.x) + offset, line.C, line.eps, t);
    for_each_register<Format>(line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      const vfloat v = affine(line, t, c, count), silu = v * sigmoid(v);
      store<Format>(y + c, count, silu * load(line.gate, c, count));
      add(line.sums, c, count, silu * load<Format>(grad + c, count));
    });
  }
}

inline vfloat silu_grad(vfloat grad, vfloat x, vfloat sigmoid) {
  return grad * sigmoid * (1.0f + x * (1.0f - sigmoid));
}

template <class Format>
void norm_silu_bwd(const StageLine& line) {
  typedef typename Format::type type;
  const float share = 1.0f / (float)(line.R * line.R);
  memset(line.sums, 0, 2 * line.C * sizeof *line.sums);
  Token t;
  vfloat grad[max_vectors];
  for (int64_t j = 0; j < line.R; ++j) {
    const int64_t offset = (line.line * line.R + j) * line.C;
    const type* const grad_v = static_cast<const type*>(line.grad) + offset;
    load_token<Format>(static_cast<const type*>(line.x) + offset, line.C, line.eps, t);
    for_each_register<Format>(line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      const vfloat g = load<Format>(grad_v + c, count) * load(line.gate, c, count);
      const vfloat v = affine(line, t, c, count);
      at(grad, c) = silu_grad(g + load(line.grad_mean, c, count) * share, v, sigmoid(v));
    });
    store_norm_grad<Format>(line, t, grad, static_cast<type*>(line.y) + offset);
  }
}

template <class Format>
void conv_bwd(const StageLine& line) {
  typedef typename Format::type type;
  type zeros[MK_MAX_NORM_CHANNELS];
  memset(zeros, 0, line.C * sizeof *zeros);
  memset(line.sums, 0, 11 * line.C * sizeof *line.sums);
  Token t;
  vfloat grad[max_vectors];
  for (int64_t j = 0; j < line.R; ++j) {
    const int64_t offset = (line.line * line.R + j) * line.C;
    const type* there[9];
    find_neighbours(line, static_cast<const type*>(line.grad), j, zeros, there);
    load_token<Format>(static_cast<const type*>(line.x) + offset, line.C, line.eps, t);
    for_each_register<Format>(line.C, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      const vfloat v = affine(line, t, c, count), s = sigmoid(v), h = v * s;
      vfloat g = {};
      MK_UNROLL for (int k = 0; k < 9; ++k) {
        // This pixel is the k-th neighbour of pixel there[8 - k].
        const vfloat grad_c = load<Format>(there[8 - k] + c, count);
        g += grad_c * load(line.taps + k * line.C, c, count);
        add(line.sums + (2 + k) * line.C, c, count, grad_c * h);
      }
      at(grad, c) = silu_grad(g, v, s);
    });
    store_norm_grad<Format>(line, t, grad, static_cast<type*>(line.y) + offset);
  }
}

}  // namespace

#define MK_STEP(name) {name<F32>, name<BF16InOrder>}
extern const mk::StageLoops MK_ISA_NAME(token_downsample_loops) = {
    MK_STEP(norm_silu), MK_STEP(conv),          MK_STEP(norm_add), MK_STEP(norm_add_bwd),
    MK_STEP(gate_bwd),  MK_STEP(norm_silu_bwd), MK_STEP(conv_bwd), MK_STEP(add_bwd)};
