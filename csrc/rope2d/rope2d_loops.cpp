// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "common/simd.h"
#include "rope2d/rope2d_cpu.h"

namespace {

typedef uint64_t vpairs __attribute__((vector_size(vector_bytes)));

// (a, b) -> (b, a) in every pair of lanes: a rotation of 64-bit lanes needs no shuffle.
inline vfloat swap_pairs(vfloat v) {
  const vpairs pairs = (vpairs)v;
  return (vfloat)(pairs << 32 | pairs >> 32);
}

// What the other channel of the pair is multiplied with: (-sin a, sin b), or (sin b, -sin a) for the adjoint.
template <bool adjoint>
inline vfloat cross(vfloat sin) {
  const vfloat turn = (vfloat)((vpairs)sin ^ 0x80000000u);  // the even lane is the low half; little-endian only
  return adjoint ? swap_pairs(turn) : turn;
}

template <class Format, bool adjoint>
inline void turn(const typename Format::type* x, const float* cos, const float* sin, int count,
                 typename Format::type* y) {
  vfloat v[1], c[1], s[1];
  Format::load(x, count, v);
  F32::load(cos, count, c);
  F32::load(sin, count, s);
  v[0] = v[0] * c[0] + swap_pairs(v[0]) * cross<adjoint>(s[0]);
  Format::store(y, count, v);
}

template <class Format, bool adjoint>
void turn_token(const mk::RopeToken& t) {
  typedef typename Format::type type;
  for (int64_t head = 0; head < t.H; ++head) {
    const type* const x = static_cast<const type*>(t.x) + head * t.x_stride;
    type* const y = static_cast<type*>(t.y) + head * t.D;
    int64_t c = 0;
    for (; c + lanes <= t.D; c += lanes) turn<Format, adjoint>(x + c, t.cos + c, t.sin + c, lanes, y + c);
    if (c < t.D) turn<Format, adjoint>(x + c, t.cos + c, t.sin + c, (int)(t.D - c), y + c);
  }
}

}  // namespace

extern const mk::RopeLoops MK_ISA_NAME(rope2d_loops) = {turn_token<F32, false>, turn_token<BF16InOrder, false>,
                                                        turn_token<F32, true>, turn_token<BF16InOrder, true>};
