#include "common/cpu.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>

namespace {

#define MK_NAME_OF(unused, isa) #isa,
const char* const isa_names[] = {MK_FOR_EACH_ISA(MK_NAME_OF, )};
constexpr int isa_count = sizeof isa_names / sizeof *isa_names;

// Asks for every feature that CMakeLists.txt lets the compiler use in a set.
int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 + (avx2 && avx512) + (avx2 && avx512 && __builtin_cpu_supports("avx512bf16"));
#else
  return 0;
#endif
}

std::atomic<int> current_isa{best_isa()};
std::atomic<mk_parallel_for> current_parallel_for{nullptr};

constexpr uint64_t huge_page = 1 << 21;

struct Workspace {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Workspace() { free(memory); }
};
thread_local Workspace thread_workspaces[2];

}  // namespace

int mk::cpu_isa() { return current_isa.load(std::memory_order_relaxed); }

int mk::parallel_for(int64_t n, int64_t grain, mk_range_body body, void* context) {
  const mk_parallel_for run = current_parallel_for.load(std::memory_order_relaxed);
  if (run == nullptr || n <= grain) {
    if (n > 0) body(0, n, context);
    return MK_OK;
  }
  const int error = run(0, n, grain, body, context);
  return error ? fail(MK_THREADS_ERROR, "parallel_for failed with code %d", error) : MK_OK;
}

MK_API void mk_advise_huge_pages(uint64_t memory, uint64_t bytes) {
  const uint64_t begin = (memory + huge_page - 1) / huge_page * huge_page,
                 end = (memory + bytes) / huge_page * huge_page;
  if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // the system may ignore it
}

void* mk::workspace(int64_t bytes, int slot) {
  Workspace& w = thread_workspaces[slot];
  if (bytes > w.bytes) {
    free(w.memory);
    const int64_t page = huge_page, rounded = (bytes + page - 1) / page * page;
    w.memory = aligned_alloc(huge_page, (size_t)rounded);
    mk_advise_huge_pages((uint64_t)w.memory, (uint64_t)rounded);
    w.bytes = w.memory ? rounded : 0;
  }
  return w.memory;
}

MK_API void mk_set_parallel_for(mk_parallel_for parallel_for) { current_parallel_for = parallel_for; }

MK_API const char* mk_cpu_isa(void) { return isa_names[mk::cpu_isa()]; }

MK_API const char* mk_cpu_isas(void) {
  static const char* const up_to[] = {"base", "base,avx2", "base,avx2,avx512", "base,avx2,avx512,avx512_bf16"};
  return up_to[best_isa()];
}

MK_API int mk_set_cpu_isa(const char* name) {
  for (int isa = 0; isa < isa_count; ++isa) {
    if (strcmp(name, isa_names[isa]) != 0) continue;
    if (isa > best_isa()) {
      return mk::fail(MK_UNSUPPORTED, "instruction set %s: this processor has only %s", name, mk_cpu_isas());
    }
    current_isa = isa;
    return MK_OK;
  }
  return mk::fail(MK_BAD_ARG, "instruction set must be one of %s, got \"%s\"", mk_cpu_isas(), name);
}
