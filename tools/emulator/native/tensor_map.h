// What stands in for a CUtensorMap of 128 bytes.
#pragma once

#include <cstdint>

namespace emulator {

constexpr uint64_t TENSOR_MAP = 0x70616d2d726f7374ull;

struct TensorMap {
  uint64_t magic = TENSOR_MAP, base = 0;
  uint64_t size[5] = {1, 1, 1, 1, 1}, stride[4] = {};  // stride in bytes, of dimensions 1 to 4
  uint16_t box[5] = {1, 1, 1, 1, 1};
  uint16_t swizzle = 0, element = 0, rank = 0;  // swizzle and element in bytes
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace emulator
