// For every C function: how it fails, reads its argument block and checks the numbers in it.
#pragma once

#include <string.h>

#include "common/mova_kernels.h"

namespace mk {

// Remembers the message for mk_last_error and returns the status, so that callers can write `return fail(...)`.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

inline int no_memory(const char* function) { return fail(MK_NO_MEMORY, "%s: out of memory", function); }

// Calls run(function, args) with a copy of the caller's block. A size that differs means that the two sides were built
// from different headers.
template <class Args>
int call(const char* function, int (*run)(const char*, const Args&), const void* block, uint64_t nbytes) {
  if (nbytes != sizeof(Args)) {
    return fail(MK_BAD_ARG, "%s: the argument block must have %llu bytes, got %llu", function,
                (unsigned long long)sizeof(Args), (unsigned long long)nbytes);
  }
  Args args;
  memcpy(&args, block, sizeof args);
  return run(function, args);
}

// Defines the C function `name`, which does what `int run(const char* function, const Args&)` does.
#define MK_DEFINE(name, run) \
  MK_API int name(const void* block, uint64_t nbytes) { return mk::call(#name, run, block, nbytes); }

// A number in an argument block and the range it must lie in.
struct Limits {
  const char* name;
  int64_t value, least = 0, most = INT64_MAX;
};

template <int n>
int check_limits(const char* function, const Limits (&limits)[n]) {
  for (const Limits& l : limits) {
    if (l.value < l.least || l.value > l.most) {
      return fail(MK_BAD_ARG, "%s: %s must be in [%lld, %lld], got %lld", function, l.name, (long long)l.least,
                  (long long)l.most, (long long)l.value);
    }
  }
  return MK_OK;
}

}  // namespace mk
