// What every C entry point needs: a way to fail, and a way to read its argument block.
#pragma once

#include <string.h>

#include "common/mova_kernels.h"

namespace mk {

// Remembers the message for mk_last_error and returns the status, so that callers can write `return fail(...)`.
__attribute__((format(printf, 2, 3))) int fail(int status, const char* format, ...);

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

}  // namespace mk
