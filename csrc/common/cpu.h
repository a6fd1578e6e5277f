// For the driver of an op: threads, and the choice between loops that were compiled once per instruction set.
#pragma once

#include "common/host.h"

#if defined(__x86_64__)
#define MK_FOR_EACH_ISA(X, ...) \
  X(__VA_ARGS__, base) X(__VA_ARGS__, avx2) X(__VA_ARGS__, avx512) X(__VA_ARGS__, avx512_bf16)
#else
#define MK_FOR_EACH_ISA(X, ...) X(__VA_ARGS__, base)
#endif

// Loops are a struct of function pointers. The file compiled once per instruction set (CMake passes MK_ISA) defines
//     extern const Loops MK_ISA_NAME(op_loops) = {...};
// and the driver declares all of them with MK_DECLARE_LOOPS(Loops, op_loops), then calls through op_loops().
#define MK_ISA_NAME(name) MK_JOIN(name, MK_ISA)
#define MK_JOIN(name, isa) MK_JOIN_EXPANDED(name, isa)
#define MK_JOIN_EXPANDED(name, isa) name##_##isa
#define MK_DECLARE_ONE(Loops, name, isa) extern const Loops name##_##isa;
#define MK_ADDRESS_OF(name, isa) &name##_##isa,
#define MK_DECLARE_LOOPS(Loops, name)                                            \
  MK_FOR_EACH_ISA(MK_DECLARE_ONE, Loops, name)                                   \
  static const Loops& name() {                                                   \
    static const Loops* const by_isa[] = {MK_FOR_EACH_ISA(MK_ADDRESS_OF, name)}; \
    return *by_isa[mk::cpu_isa()];                                               \
  }

namespace mk {

int cpu_isa();

// Runs body(begin, end) over disjoint parts of [0, n), at least `grain` long where n allows. The body must not throw.
int parallel_for(int64_t n, int64_t grain, mk_range_body body, void* context);

template <class Body>
int parallel_for(int64_t n, int64_t grain, const Body& body) {
  return parallel_for(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// Returns scratch memory of the calling thread, aligned to 64 bytes, or null. The next call with this slot returns
// the same memory: one slot is for memory that the parts of a parallel_for share, the other for a part's own.
constexpr int own_slot = 0, shared_slot = 1;
void* workspace(int64_t bytes, int slot = own_slot);

}  // namespace mk
