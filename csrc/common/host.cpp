#include "common/host.h"

#include <stdarg.h>
#include <stdio.h>

namespace {
thread_local char last_error[512];
}

int mk::fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

MK_API int mk_abi_version(void) { return MK_ABI_VERSION; }
MK_API const char* mk_last_error(void) { return last_error; }
