// The input positions that an output position reads, and their weights, for the CPU and for CUDA.
//
// Output d of an axis lies at ((d + 0.5) * in / out - 0.5) in input positions, clamped to [0, in - 1]. In units of
// 1 / (2 * out) that is the integer (2 * d + 1) * in - out, so positions are exact and a weight, one minus the distance
// to the input position, is rounded once. torch computes both in fp32 and is off by an ulp of the position.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MK_HD __host__ __device__
#else
#define MK_HD
#endif

namespace mk {

struct ResampleAxis {
  int32_t in, out;

  MK_HD int32_t position(int32_t d) const {
    const int32_t exact = (2 * d + 1) * in - out, last = 2 * out * (in - 1);
    return exact < 0 ? 0 : exact > last ? last : exact;
  }

  // Output d reads the inputs tap0(d) <= tap1(d). They are one and the same at the far edge, and everywhere on an axis
  // that keeps its size.
  MK_HD int32_t tap0(int32_t d) const { return position(d) / (2 * out); }
  MK_HD int32_t tap1(int32_t d) const {
    const int32_t i = tap0(d);
    return i + (i + 1 < in && in != out);
  }

  MK_HD float weight(int32_t d, int32_t i) const {
    const int32_t offset = position(d) - 2 * out * i, distance = offset < 0 ? -offset : offset;
    return (float)(2 * out - distance) / (float)(2 * out);
  }

  // Input i is read by the outputs from first_reader(i) up to, not including, last_reader(i): those whose tap0 is i - 1
  // or i.
  MK_HD int32_t first_reader(int32_t i) const { return in == out ? i : first_beyond(i - 1); }
  MK_HD int32_t last_reader(int32_t i) const { return in == out ? i + 1 : first_beyond(i + 1); }

 private:
  // The first output whose position is at least i.
  MK_HD int32_t first_beyond(int32_t i) const {
    if (i <= 0) return 0;
    const int32_t d = ((2 * i + 1) * out + in - 1) / (2 * in);
    return d < out ? d : out;
  }
};

}  // namespace mk
