// Tensor maps that a program makes itself: tensormap.replace fills one in shared memory, field by field, and
// tensormap.cp_fenceproxy takes it to global memory, where bulk copies find it.
#include <cstddef>

#include "machine.h"

namespace emulator {
namespace {

constexpr int BYTES = 128;  // of a map

// In the order of opcodes.py.
enum Field { ADDRESS, RANK, BOX, SIZE, STRIDE, ELEMENT_STRIDE, ELEMENT, INTERLEAVE, SWIZZLE, FILL };

int bytes_of_type(Warp& w, u64 type) {
  // u8, u16, u32, s32, u64, s64, f16, f32, f32.ftz, f64, bf16; the others round or flush on the way.
  const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 0, 8, 2};
  if (type >= std::size(bytes) || !bytes[type]) fault(w, "tensor maps of the type %d are not emulated", (int)type);
  return bytes[type];
}

// at: address, value; imm: offset, bytes of the address's register, bytes of the value's, which field, and of which
// dimension.
void replace(Warp& w, const Instruction& i, u32 lanes) {
  for (int lane : each(lanes)) {
    const u64 address = (i.imm[1] == 8 ? operand<u64>(w, i, 0)[lane] : operand<u32>(w, i, 0)[lane]) + i.imm[0];
    const u64 value = i.imm[2] == 8 ? operand<u64>(w, i, 1)[lane] : operand<u32>(w, i, 1)[lane];
    const int dimension = i.imm[4];
    u8* place = shared_memory(w, address, BYTES, true);
    if (address % BYTES) fault(w, "tensor map at %llu, which is misaligned", (unsigned long long)address);
    if (w.block->launch->checks()) {
      check_shared(w, own(w, address, BYTES, READ));
      check_shared(w, own(w, address, BYTES, WRITE));
    }
    TensorMap map;
    memcpy(&map, place, sizeof map);
    map.magic = TENSOR_MAP;
    switch (i.imm[3]) {
      case ADDRESS:
        map.base = value;
        break;
      case RANK:
        map.rank = value + 1;
        break;
      case BOX:
        map.box[dimension] = value;
        break;
      case SIZE:
        map.size[dimension] = value;
        break;
      case STRIDE:
        map.stride[dimension] = value;
        break;
      case ELEMENT:
        map.element = bytes_of_type(w, value);
        break;
      case SWIZZLE:
        if (value > 3) fault(w, "this swizzle of tensor maps is not emulated");
        map.swizzle = value ? 16 << value : 0;
        break;
      case ELEMENT_STRIDE:
        if (value != 1) fault(w, "strides of elements in tensor maps are not emulated");
        break;
      case INTERLEAVE:
      case FILL:
        if (value) fault(w, "interleaved tensor maps, and those that fill with NaN, are not emulated");
        break;
    }
    memcpy(place, &map, sizeof map);
  }
}

// The conditions are those of cuTensorMapEncodeTiled.
bool valid(const TensorMap& map) {
  const int row = map.box[0] * map.element;
  bool good =
      map.rank >= 1 && map.rank <= 5 && map.base % 16 == 0 && row % 16 == 0 && (!map.swizzle || row <= map.swizzle);
  for (int d = 0; d < map.rank && good; ++d) {
    good = map.size[d] && map.box[d] && map.box[d] <= 256 && (d == 0 || map.stride[d - 1] % 16 == 0);
  }
  return good;
}

// at: to, from.
void copy(Warp& w, const Instruction& i, u32 lanes) {
  const int lane = first_lane(lanes);
  const u64 to = operand<u64>(w, i, 0)[lane] + i.imm[0];
  const u64 from = (i.imm[2] == 8 ? operand<u64>(w, i, 1)[lane] : operand<u32>(w, i, 1)[lane]) + i.imm[1];
  const u8* map = shared_memory(w, from, BYTES, false);
  u8* place = global_memory(w, to, BYTES, true);
  if (to % BYTES || from % BYTES) fault(w, "a tensor map is misaligned");
  if (w.block->launch->checks()) {
    check_shared(w, own(w, from, BYTES, READ));
    check_global(w, own(w, to, BYTES, WRITE, map));
  }
  TensorMap copied;
  memcpy(&copied, map, sizeof copied);
  if (copied.magic != TENSOR_MAP || !valid(copied)) fault(w, "the GPU does not accept this tensor map");
  memcpy(place, map, BYTES);
}

}  // namespace

void add_tensor_maps(Table& t) {
  t["tensormap.replace"] = replace;
  t["tensormap.copy"] = copy;
}

}  // namespace emulator
