// What tools/instruction_counts.py counts: every function of the CPU library that takes an argument block, in fp32 and
// in bf16, on one thread.
//     instruction_counts INSTRUCTION_SET
// prints "function variant dtype" for every call of counted(), in order. Exits with 2 without that instruction set.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/matmul.h"
#include "expert_attention/expert_attention.h"
#include "expert_gate/expert_gate.h"
#include "feature_norm/feature_norm.h"
#include "feature_resample/feature_resample.h"
#include "gated_combine/gated_combine.h"
#include "ragged_linear/ragged_linear.h"
#include "rope2d/rope2d.h"
#include "swiglu_norm/swiglu_norm.h"
#include "token_downsample/token_downsample.h"

typedef int (*Function)(const void* args, uint64_t nbytes);

// The function whose instructions, with those of what it calls, are counted.
extern "C" __attribute__((noinline)) int counted(Function function, const void* args, uint64_t nbytes) {
  return function(args, nbytes);
}

namespace {

// In groups of four vectors of 8 lanes, one such vector and a rest: loops have code for each of them.
constexpr int64_t channels = 16 * 32 + 8 + 4;
// A grid that is resampled to another one, up and down.
constexpr int64_t in_h = 5, in_w = 7, out_h = 8, out_w = 6, in_tokens = in_h * in_w, out_tokens = out_h * out_w;
constexpr double eps = 1e-5;

int64_t dtype;  // of the cases that run

// Every case has its tensors at the same addresses, with the same values.
alignas(64) char memory[1 << 23];
int64_t used;
uint32_t state;

char* allocate(int64_t bytes) {
  char* const p = memory + used;
  used += (bytes + 63) / 64 * 64;
  if (used > (int64_t)sizeof memory) {
    fprintf(stderr, "a case needs more than %zu bytes\n", sizeof memory);
    exit(1);
  }
  return p;
}

float random_number() {
  state = state * 1664525 + 1013904223;
  return (float)(int32_t)state / 2147483648.0f;
}

uint64_t floats(int64_t n) {
  float* const p = (float*)allocate(n * 4);
  for (int64_t i = 0; i < n; ++i) p[i] = random_number();
  return (uint64_t)p;
}

uint64_t tensor(int64_t n) {
  if (dtype == MK_F32) return floats(n);
  uint16_t* const p = (uint16_t*)allocate(n * 2);
  for (int64_t i = 0; i < n; ++i) {
    const float wide = random_number();
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    p[i] = (uint16_t)(bits >> 16);
  }
  return (uint64_t)p;
}

uint64_t booleans(int64_t n) {
  bool* const p = (bool*)allocate(n);
  for (int64_t i = 0; i < n; ++i) p[i] = random_number() > 0;
  return (uint64_t)p;
}

void check(int status) {
  if (status == MK_OK) return;
  fprintf(stderr, "%s\n", mk_last_error());
  exit(1);
}

// The call before the counted one finds no scratch memory yet, or too little.
template <class Args>
void call(const char* name, const char* variant, Function function, const Args& args) {
  check(function(&args, sizeof args));
  check(counted(function, &args, sizeof args));
  printf("%s %s %s\n", name, variant, dtype == MK_F32 ? "fp32" : "bf16");
}
#define CALL(function, variant, args) call(#function, variant, function, args)

void matmul() {
  constexpr int64_t M = 100, N = 260, K = 100;  // blocks and a rest of each
  mk_matmul_args a = {tensor(M * K), tensor(K * N), tensor(N), tensor(M * N), tensor(M * N), M, N, K, K, 1, 1, K, N, N,
                      dtype};
  CALL(mk_matmul, "forward", a);
  // The gradient of a weight: the first matrix is transposed, the second is not, and there is nothing to add.
  a.bias = a.added = 0;
  a.a_stride_row = 1, a.a_stride_column = M, a.b_stride_row = N, a.b_stride_column = 1;
  CALL(mk_matmul, "backward", a);
}

void expert_attention() {
  constexpr int64_t P = 1, L = 200, H = 2, D = 64, I = H * D,
                    n = P * L * I;  // more queries than a thread takes at once
  const uint64_t q = tensor(n), k = tensor(n), v = tensor(n), out = tensor(n);
  const uint64_t cos = floats(L * D), sin = floats(L * D), lse = floats(P * H * L);
  CALL(mk_expert_attention_fwd, "-",
       (mk_expert_attention_fwd_args{q, k, v, cos, sin, out, lse, P, L, H, D, L * I, I, L * I, I, L * I, I, dtype}));
  CALL(mk_expert_attention_bwd, "-",
       (mk_expert_attention_bwd_args{tensor(n), q,         k,         v,     out, lse,   cos, sin,
                                     tensor(n), tensor(n), tensor(n), P,     L,   H,     D,   L * I,
                                     I,         L * I,     I,         L * I, I,   L * I, I,   dtype}));
}

void expert_gate() {
  constexpr int64_t B = 64, N = 7;
  const uint64_t logits = tensor(B * N), kept = booleans(B * N);
  CALL(mk_expert_gate_fwd, "-",
       (mk_expert_gate_fwd_args{logits, booleans(B * N), floats(B * N), kept, B, N, N, 1, N, 1, 3, dtype}));
  CALL(mk_expert_gate_bwd, "-",
       (mk_expert_gate_bwd_args{floats(B * N), logits, kept, tensor(B * N), B, N, N, 1, N, 1, N, 1, dtype}));
}

void feature_norm() {
  constexpr int64_t C = channels;
  const uint64_t x = tensor(in_tokens * C), y = tensor(out_tokens * C), rstd = floats(out_tokens);
  CALL(mk_feature_norm_fwd, "-",
       (mk_feature_norm_fwd_args{x, 0, y, rstd, 1, in_h, in_w, out_h, out_w, C, in_tokens * C, C, eps, dtype}));
  CALL(mk_feature_norm_centre, "-",
       (mk_feature_norm_centre_args{x, 0, tensor(in_tokens * C), rstd, 1, in_h, in_w, out_h, out_w, C, in_tokens * C, C,
                                    eps, dtype}));
  CALL(mk_feature_norm_bwd, "-",
       (mk_feature_norm_bwd_args{tensor(out_tokens * C), 0, y, rstd, tensor(out_tokens * C), 1, out_tokens, C,
                                 out_tokens * C, C, dtype}));
}

void feature_resample() {
  constexpr int64_t C = channels;
  const mk_feature_resample_args a = {tensor(in_tokens * C), 0, tensor(out_tokens * C), 1, in_h, in_w, out_h, out_w, C,
                                      in_tokens * C,         C, out_tokens * C,         C, dtype};
  CALL(mk_feature_resample_fwd, "-", a);
  CALL(mk_feature_resample_bwd, "-", a);
}

void gated_combine() {
  constexpr int64_t L = 70, I = channels, parts = 2;  // a whole part and the beginning of one
  const uint64_t x = tensor(L * I), scale = tensor(I), shift = tensor(I), z = tensor(L * I);
  CALL(mk_gated_combine_fwd, "-", (mk_gated_combine_fwd_args{x, scale, shift, z, L, I, I, I, eps, 0.5, dtype}));
  CALL(mk_gated_combine_bwd, "-",
       (mk_gated_combine_bwd_args{x, tensor(L * I), scale, shift, tensor(L * I), z, floats(parts * I),
                                  floats(parts * I), floats(L), L, I, I, eps, 0.5, dtype}));
}

void ragged_linear() {
  constexpr int64_t R = 70, C = channels;
  CALL(mk_ragged_linear_sum, "-", (mk_ragged_linear_sum_args{tensor(R * C), floats(C), R, C, C, dtype}));
  CALL(mk_ragged_linear_unfold, "-",
       (mk_ragged_linear_unfold_args{tensor(R * C), tensor(R * C), floats(R), tensor(C), tensor(C), tensor(R * C),
                                     floats(C), floats(C), R, C, C, C, dtype}));
  CALL(mk_ragged_linear_resample, "-",
       (mk_ragged_linear_resample_args{tensor(in_tokens * C), floats(out_tokens), floats(C), tensor(out_tokens * C), 1,
                                       in_h, in_w, out_h, out_w, C, dtype}));
}

void rope2d() {
  constexpr int64_t L = 64, H = 4, D = 64;
  mk_rope2d_args a = {
      tensor(L * H * D), floats(L * D), floats(L * D), tensor(L * H * D), 1, L, H, D, L * H * D, H * D, D, 0, dtype};
  CALL(mk_rope2d, "forward", a);
  a.adjoint = 1;
  CALL(mk_rope2d, "backward", a);
}

void swiglu_norm() {
  constexpr int64_t L = 32, F = channels, width = F + 4, n = L * width, blocks = 2;
  const uint64_t gate = tensor(n), up = tensor(n), weight = floats(width), mean = floats(L), rstd = floats(L);
  CALL(mk_swiglu_norm_fwd, "-",
       (mk_swiglu_norm_fwd_args{gate, up, weight, floats(width), tensor(n), mean, rstd, 1, L, width, F, n, width, n,
                                width, eps, dtype}));
  CALL(mk_swiglu_norm_bwd, "-",
       (mk_swiglu_norm_bwd_args{tensor(n),
                                gate,
                                up,
                                weight,
                                mean,
                                rstd,
                                tensor(n),
                                tensor(n),
                                floats(blocks * 2 * width),
                                floats(width),
                                floats(width),
                                1,
                                L,
                                width,
                                F,
                                blocks,
                                n,
                                width,
                                n,
                                width,
                                n,
                                width,
                                dtype}));
}

void token_downsample() {
  constexpr int64_t R = 6, C = channels, n = R * R * C, most_sums = 11;
  mk_token_downsample_args a = {tensor(n),
                                tensor(n),
                                tensor(n),
                                floats(C),
                                floats(C),
                                floats(9 * C),
                                floats(C),
                                floats(C),
                                tensor(n),
                                floats(R * most_sums * C),
                                floats(most_sums * C),
                                1,
                                R,
                                C,
                                0,
                                R * R * C,
                                C,
                                0,
                                dtype,
                                eps};
#define STEP(name, sums) a.num_sums = sums, CALL(mk_token_downsample_##name, a.pool ? "pool" : "-", a)
  STEP(norm_silu, 0);
  STEP(conv, 1);
  STEP(norm_add, 0);
  STEP(norm_add_bwd, 2);
  STEP(gate_bwd, 1);
  STEP(norm_silu_bwd, 2);
  STEP(conv_bwd, 11);
  STEP(add_bwd, 0);
  a.pool = 1;
  STEP(norm_add, 0);
  STEP(norm_add_bwd, 2);
  STEP(add_bwd, 0);
#undef STEP
}

void (*const cases[])() = {matmul,        expert_attention, expert_gate, feature_norm, feature_resample,
                           gated_combine, ragged_linear,    rope2d,      swiglu_norm,  token_downsample};

}  // namespace

int main(int count, char** arguments) {
  if (count != 2 || mk_set_cpu_isa(arguments[1]) != MK_OK) {
    fprintf(stderr, "%s\n", count == 2 ? mk_last_error() : "usage: instruction_counts INSTRUCTION_SET");
    return 2;
  }
  for (dtype = MK_F32; dtype <= MK_BF16; ++dtype) {
    for (auto* run : cases) {
      used = 0, state = 1;
      run();
    }
  }
  return 0;
}
