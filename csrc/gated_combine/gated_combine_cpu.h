// The interface between the driver and the loops.
#pragma once

#include "common/dtype.h"
#include "gated_combine/gated_combine.h"

namespace mk {

struct CombineLoops {
  ByDtype<void (*)(const mk_gated_combine_fwd_args&, int64_t begin, int64_t end)> weigh;  // the tokens [begin, end)
  ByDtype<void (*)(const mk_gated_combine_bwd_args&, int64_t part)> grad;
};

}  // namespace mk
