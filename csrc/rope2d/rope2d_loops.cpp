// Compiled once per instruction set; see common/simd.h for what that forbids.
#include "common/channels.h"
#include "common/cpu.h"
#include "rope2d/rope2d_cpu.h"
#include "rope2d/rotate.h"

namespace {

template <class Format, bool adjoint>
void rotate_token(const mk::RopeToken& t) {
  typedef typename Format::type type;
  for (int64_t head = 0; head < t.H; ++head) {
    const type* const x = static_cast<const type*>(t.x) + head * t.x_stride;
    type* const y = static_cast<type*>(t.y) + head * t.D;
    for_each_register<Format>(t.D, [&](int64_t c, int count) MK_ALWAYS_INLINE {
      const vfloat cos = load<F32>(t.cos + c, count), sin = load<F32>(t.sin + c, count);
      store<Format>(y + c, count, rotate<adjoint>(load<Format>(x + c, count), cos, sin));
    });
  }
}

}  // namespace

extern const mk::RopeLoops MK_ISA_NAME(rope2d_loops) = {{rotate_token<F32, false>, rotate_token<BF16InOrder, false>},
                                                        {rotate_token<F32, true>, rotate_token<BF16InOrder, true>}};
