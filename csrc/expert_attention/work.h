// Which part of the attention a persistent block computes: for the device, and for the tests on the host.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MK_HD __host__ __device__
#else
#define MK_HD
#endif

namespace mk {

// The items are the (pair, head, tile of tokens). The tiles of a head are neighbours: its keys stay in the L2 cache.
struct AttentionWork {
  const int64_t* num_valid;  // the number of pairs that are not padding, on the device; null: all are not
  int32_t pairs, heads, length, tiles;

  struct Item {
    int32_t pair, head, tile;
  };
  MK_HD Item item(int32_t i) const { return {i / tiles / heads, i / tiles % heads, i % tiles}; }
  MK_HD int32_t valid_pairs() const {
    if (!num_valid || *num_valid >= pairs) return pairs;
    return *num_valid < 0 ? 0 : (int32_t)*num_valid;
  }
  MK_HD int32_t bound() const { return pairs * heads * tiles; }  // what the host knows of items()
  MK_HD int32_t items() const { return valid_pairs() * heads * tiles; }
};

}  // namespace mk
