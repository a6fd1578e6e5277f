// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/cpu.h"
#include "rope2d/rope2d_cpu.h"
#include "rope2d/rotate.h"

namespace {

template <class Format, bool adjoint>
inline void turn(const typename Format::type* x, const float* cos, const float* sin, int count,
                 typename Format::type* y) {
  store<Format>(y, count, rotate<adjoint>(load<Format>(x, count), load<F32>(cos, count), load<F32>(sin, count)));
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
