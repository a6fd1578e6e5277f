// Attention in fp64, for scores and sums that fp32 cannot hold: simple, slow, and the same with every instruction set.
// It takes `batch` queries at a time, since the compiler turns an array of that many numbers into vectors.
#include "expert_attention/wide_rows.h"

#include <math.h>
#include <string.h>

#include <new>
#include <vector>

namespace {

constexpr int batch = 8;
constexpr double log2e = 1.4426950408889634;

template <class T>
void load_row(const void* rows, int64_t stride, int64_t t, int64_t D, double* x) {
  const T* const row = (const T*)rows + t * stride;
  for (int64_t d = 0; d < D; ++d) x[d] = mk::to_float(row[d]);
}

template <class T>
void load_rotated(const mk::AttentionHead& h, const void* rows, int64_t stride, int64_t t, double* x) {
  load_row<T>(rows, stride, t, h.D, x);
  const float *const cos = h.cos + t * h.D, *const sin = h.sin + t * h.D;
  for (int64_t d = 0; d < h.D; d += 2) {
    const double a = x[d], b = x[d + 1];
    x[d] = a * cos[d] - b * sin[d];
    x[d + 1] = b * cos[d + 1] + a * sin[d + 1];
  }
}

template <class T>
void store_row(const double* x, int64_t D, void* rows, int64_t stride, int64_t t) {
  T* const row = (T*)rows + t * stride;
  for (int64_t d = 0; d < D; ++d) mk::from_float((float)x[d], row + d);
}

template <class T>
void store_rotated_back(const mk::AttentionHead& h, double* x, void* rows, int64_t t) {
  const float *const cos = h.cos + t * h.D, *const sin = h.sin + t * h.D;
  for (int64_t d = 0; d < h.D; d += 2) {
    const double a = x[d], b = x[d + 1];
    x[d] = a * cos[d] + b * sin[d + 1];
    x[d + 1] = b * cos[d + 1] - a * sin[d];
  }
  store_row<T>(x, h.D, rows, h.out_stride, t);
}

// (batch, D) rows, and the same with the batch as the last dimension.
struct Batch {
  double rows[batch][MK_MAX_HEAD_WIDTH], columns[MK_MAX_HEAD_WIDTH][batch];

  void transpose(int64_t D) {
    for (int64_t d = 0; d < D; ++d) {
      for (int i = 0; i < batch; ++i) columns[d][i] = rows[i][d];
    }
  }

  // Computes the dot products of all rows with x.
  void times(const double* x, int64_t D, double* products) const {
    double sums[batch] = {};
    for (int64_t d = 0; d < D; ++d) {
      for (int i = 0; i < batch; ++i) sums[i] += columns[d][i] * x[d];
    }
    memcpy(products, sums, sizeof sums);
  }
};

// Turns (L, batch) scores into probabilities; row_sums are the sums of exp(score - row_max).
void softmax(double* scores, int64_t L, double* row_max, double* row_sums) {
  for (int i = 0; i < batch; ++i) row_max[i] = -INFINITY, row_sums[i] = 0;
  for (int64_t j = 0; j < L; ++j) {
    for (int i = 0; i < batch; ++i) {
      const double score = scores[j * batch + i];
      if (!(score <= row_max[i]) && row_max[i] == row_max[i]) row_max[i] = score;  // a NaN stays
    }
  }
  for (int64_t j = 0; j < L; ++j) {
    for (int i = 0; i < batch; ++i) row_sums[i] += scores[j * batch + i] = exp(scores[j * batch + i] - row_max[i]);
  }
  for (int64_t j = 0; j < L; ++j) {
    for (int i = 0; i < batch; ++i) scores[j * batch + i] /= row_sums[i];
  }
}

template <class T>
void forward(const mk::AttentionHead& h, const int64_t* queries, int64_t count) {
  const double root = 1 / sqrt((double)h.D);
  Batch query;
  double x[MK_MAX_HEAD_WIDTH], out[MK_MAX_HEAD_WIDTH][batch];
  std::vector<double> probabilities(h.L * batch);
  for (int64_t first = 0; first < count; first += batch) {
    const int used = (int)(count - first < batch ? count - first : batch);
    memset(&query, 0, sizeof query);
    for (int i = 0; i < used; ++i) load_rotated<T>(h, h.q, h.q_stride, queries[first + i], query.rows[i]);
    query.transpose(h.D);
    for (int64_t j = 0; j < h.L; ++j) {
      load_rotated<T>(h, h.k, h.k_stride, j, x);
      query.times(x, h.D, &probabilities[j * batch]);
      for (int i = 0; i < batch; ++i) probabilities[j * batch + i] *= root;
    }
    double row_max[batch], row_sums[batch];
    softmax(probabilities.data(), h.L, row_max, row_sums);

    memset(out, 0, sizeof out);
    for (int64_t j = 0; j < h.L; ++j) {
      load_row<T>(h.v, h.v_stride, j, h.D, x);
      const double* const probability = &probabilities[j * batch];
      for (int64_t d = 0; d < h.D; ++d) {
        for (int i = 0; i < batch; ++i) out[d][i] += probability[i] * x[d];
      }
    }
    for (int i = 0; i < used; ++i) {
      for (int64_t d = 0; d < h.D; ++d) x[d] = out[d][i];
      store_row<T>(x, h.D, h.out, h.out_stride, queries[first + i]);
      h.lse[queries[first + i]] = (float)(row_max[i] * log2e + log2(row_sums[i]));
    }
  }
}

template <class T>
void backward(const mk::AttentionGradients& g) {
  const mk::AttentionHead& h = g.head;
  const int64_t L = h.L, D = h.D;
  const double root = 1 / sqrt((double)D);
  Batch query, grad;
  double k[MK_MAX_HEAD_WIDTH], x[MK_MAX_HEAD_WIDTH], grad_q[batch][MK_MAX_HEAD_WIDTH];
  std::vector<double> probabilities(L * batch), grad_probabilities(L * batch), grad_k(L * D), grad_v(L * D);
  for (int64_t first = 0; first < L; first += batch) {
    const int used = (int)(L - first < batch ? L - first : batch);
    memset(&query, 0, sizeof query);
    memset(&grad, 0, sizeof grad);
    for (int i = 0; i < used; ++i) {
      load_rotated<T>(h, h.q, h.q_stride, first + i, query.rows[i]);
      load_row<T>(g.grad, g.grad_stride, first + i, D, grad.rows[i]);
    }
    query.transpose(D);
    grad.transpose(D);
    for (int64_t j = 0; j < L; ++j) {
      load_rotated<T>(h, h.k, h.k_stride, j, x);
      query.times(x, D, &probabilities[j * batch]);
      for (int i = 0; i < batch; ++i) probabilities[j * batch + i] *= root;
      load_row<T>(h.v, h.v_stride, j, D, x);
      grad.times(x, D, &grad_probabilities[j * batch]);
    }
    double row_max[batch], row_sums[batch], delta[batch] = {};
    softmax(probabilities.data(), L, row_max, row_sums);
    for (int64_t j = 0; j < L * batch; ++j) delta[j % batch] += probabilities[j] * grad_probabilities[j];

    memset(grad_q, 0, sizeof grad_q);
    for (int64_t j = 0; j < L; ++j) {
      load_rotated<T>(h, h.k, h.k_stride, j, k);
      for (int i = 0; i < used; ++i) {
        const double probability = probabilities[j * batch + i],
                     grad_score = probability * (grad_probabilities[j * batch + i] - delta[i]) * root;
        for (int64_t d = 0; d < D; ++d) grad_v[j * D + d] += probability * grad.rows[i][d];
        for (int64_t d = 0; d < D; ++d) grad_k[j * D + d] += grad_score * query.rows[i][d];
        for (int64_t d = 0; d < D; ++d) grad_q[i][d] += grad_score * k[d];
      }
    }
    for (int i = 0; i < used; ++i) store_rotated_back<T>(h, grad_q[i], g.grad_q, first + i);
  }
  for (int64_t j = 0; j < L; ++j) {
    store_rotated_back<T>(h, &grad_k[j * D], g.grad_k, j);
    store_row<T>(&grad_v[j * D], D, g.grad_v, h.out_stride, j);
  }
}

template <class T>
bool finite(const void* rows, int64_t stride, int64_t L, int64_t D) {
  for (int64_t t = 0; t < L; ++t) {
    for (int64_t d = 0; d < D; ++d) {
      if (!isfinite(mk::to_float(((const T*)rows)[t * stride + d]))) return false;
    }
  }
  return true;
}

template <class T>
bool all_finite(const mk::AttentionGradients& g) {
  const mk::AttentionHead& h = g.head;
  return finite<T>(h.q, h.q_stride, h.L, h.D) && finite<T>(h.k, h.k_stride, h.L, h.D) &&
         finite<T>(h.v, h.v_stride, h.L, h.D) && finite<T>(g.grad, g.grad_stride, h.L, h.D);
}

}  // namespace

bool mk::wide_forward(const AttentionHead& head, int64_t dtype, const int64_t* queries, int64_t count) try {
  dtype == MK_F32 ? forward<float>(head, queries, count) : forward<uint16_t>(head, queries, count);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

bool mk::wide_backward(const AttentionGradients& gradients, int64_t dtype) try {
  dtype == MK_F32 ? backward<float>(gradients) : backward<uint16_t>(gradients);
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

bool mk::inputs_are_finite(const AttentionGradients& gradients, int64_t dtype) {
  return dtype == MK_F32 ? all_finite<float>(gradients) : all_finite<uint16_t>(gradients);
}
