// What every C entry point needs: a way to fail, and a way to read its argument block.
#pragma once

#include <string.h>

#include "common/mova_kernels.h"

namespace mk {

// Remembers the message for mk_last_error and returns the status, so that callers can write `return fail(...)`.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

inline int no_memory(const char* function) { return fail(MK_NO_MEMORY, "%s: out of memory", function); }

// Copies the caller's block. A size that differs means that the two sides were built from different headers.
template <class Args>
int read_args(const char* function, const void* block, uint64_t nbytes, Args* args) {
  if (nbytes != sizeof(Args)) {
    return fail(MK_BAD_ARG, "%s: the argument block must have %llu bytes, got %llu", function,
                (unsigned long long)sizeof(Args), (unsigned long long)nbytes);
  }
  memcpy(args, block, sizeof(Args));
  return MK_OK;
}

// A value of the caller's block and the range it must lie in.
struct Limits {
  const char* name;
  int64_t value, least, most;
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
