// For drivers: the tables that the loops read.
#pragma once

#include <vector>

#include "feature_resample/feature_resample_cpu.h"
#include "feature_resample/taps.h"

namespace mk {

// Owns the tables of one axis, with at most 2 * out taps in either direction.
class AxisTable {
 public:
  // `step`: elements between neighbouring positions of the read tensor.
  AxisTable(int64_t in, int64_t out, int64_t step, bool adjoint) {
    const ResampleAxis axis{(int32_t)in, (int32_t)out};
    const int32_t positions = adjoint ? axis.in : axis.out;
    begin_.reserve(positions + 1);
    offset_.reserve(2 * out);
    weight_.reserve(2 * out);
    begin_.push_back(0);
    for (int32_t p = 0; p < positions; ++p) {
      const int32_t first = adjoint ? axis.first_reader(p) : axis.tap0(p);
      const int32_t end = adjoint ? axis.last_reader(p) : axis.tap1(p) + 1;
      for (int32_t q = first; q < end; ++q) {
        offset_.push_back(q * step);
        weight_.push_back(adjoint ? axis.weight(q, p) : axis.weight(p, q));
      }
      begin_.push_back((int64_t)offset_.size());
    }
  }
  GatherAxis view() const { return {begin_.data(), offset_.data(), weight_.data()}; }

 private:
  std::vector<int64_t> begin_, offset_;
  std::vector<float> weight_;
};

}  // namespace mk
