// Matrices in shared memory as wgmma and tcgen05 see them: a descriptor says where the 16 bytes with an element lie.
#pragma once

#include "machine.h"
#include "numbers.h"

namespace emulator {

struct Matrix {
  u32 start, leading, stride;  // bytes
  int swizzle;                 // bytes, 0: none
  bool along_k;                // whether the elements of a row of K lie together ("K-major")
  int element;                 // bytes

  // Of the 16 bytes that hold element (row, k), rows being those of A or the columns of B.
  u32 address(int row, int k) const {
    if (along_k) {
      int offset = k * element;
      if (!swizzle) return start + row / 8 * stride + row % 8 * 16 + offset / 16 * leading;
      return swizzled(start + row / 8 * stride + row % 8 * swizzle + offset, swizzle);
    }
    int offset = row * element;
    if (!swizzle) return start + offset / 16 * stride + k % 8 * 16 + k / 8 * leading;
    return swizzled(start + offset / swizzle * leading + offset % swizzle + k / 8 * stride + k % 8 * swizzle, swizzle);
  }
};

inline Matrix matrix_of(u64 descriptor, int swizzle, bool along_k, int element) {
  return {(u32)(descriptor & 0x3fff) << 4,
          (u32)(descriptor >> 16 & 0x3fff) << 4,
          (u32)(descriptor >> 32 & 0x3fff) << 4,
          swizzle,
          along_k,
          element};
}

// 16 bytes of elements in one of the formats, as floats.
template <class Format>
struct Elements {
  static constexpr int bytes = 2, count = 8, depth = 16;  // depth: K of one instruction
  static float at(const u8* chunk, int k) {
    u16 x;
    memcpy(&x, chunk + 2 * k, 2);
    return Format::widen(x);
  }
};
template <>
struct Elements<TF32> {
  static constexpr int bytes = 4, count = 4, depth = 8;
  static float at(const u8* chunk, int k) {
    u32 x;
    memcpy(&x, chunk + 4 * k, 4);
    return TF32::widen(x);
  }
};

// Rows ``first`` to ``first + rows`` of a matrix: to[k][row], each k ``pitch`` floats after the one before.
template <class Format>
void read_matrix(Warp& w, const Matrix& m, int first, int rows, float* to, int pitch) {
  using E = Elements<Format>;
  float value[E::count];
  auto read = [&](int row, int k) {
    const u8* chunk = shared_memory(w, m.address(first + row, k), 16, false);
    for (int e = 0; e < E::count; ++e) value[e] = E::at(chunk, e);
  };
  if (m.along_k) {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < E::depth; k += E::count) {
        read(row, k);
        for (int e = 0; e < E::count; ++e) to[(k + e) * pitch + row] = value[e];
      }
    }
  } else {
    for (int k = 0; k < E::depth; ++k) {
      for (int row = 0; row < rows; row += E::count) {
        read(row, k);
        memcpy(to + k * pitch + row, value, sizeof value);
      }
    }
  }
}

// Every 16 bytes that such a read touches, in the order of the 8 x 16 byte pieces that the hardware loads.
template <class F>
void each_chunk(const Matrix& m, int first, int rows, int depth, F f) {
  const int count = 16 / m.element;
  if (m.along_k) {
    for (int k = 0; k < depth; k += count) {
      for (int row = 0; row < rows; ++row) f(m.address(first + row, k));
    }
  } else {
    for (int row = 0; row < rows; row += count) {
      for (int k = 0; k < depth; ++k) f(m.address(first + row, k));
    }
  }
}

// What a product will read has to be there when it is issued.
inline void check_operand(Warp& w, const Instruction& i, const Matrix& m, int first, int rows, int depth,
                          bool counted) {
  Launch& launch = *w.block->launch;
  u64 addresses[8];
  int collected = 0;
  each_chunk(m, first, rows, depth, [&](u32 address) {
    shared_memory(w, address, 16, false);
    if (launch.checks()) check_shared(w, {address, 16, READ, MMA + w.id, w.product_groups + 1, true});
    addresses[collected++] = address;
    if (collected < 8) return;
    if (launch.counts() && counted) count_shared(w, i, addresses, 0xff, 16);
    collected = 0;
  });
}

}  // namespace emulator
