#include <atomic>

#include "common/cpu.h"
#include "common/matmul_cpu.h"

MK_DECLARE_LOOPS(mk::MatmulLoops, matmul_loops)

namespace {

int matmul(const char* function, const mk_matmul_args& a) {
  if (int status =
          mk::check_limits(function, {{"M", a.M}, {"N", a.N}, {"K", a.K}, {"dtype", a.dtype, MK_F32, MK_BF16}})) {
    return status;
  }
  if (a.M == 0 || a.N == 0) return MK_OK;
  const mk::MatmulOf& loops = matmul_loops()[a.dtype];
  const int64_t groups = (a.N + mk::matmul_columns - 1) / mk::matmul_columns;
  const int64_t panels = (a.M + mk::matmul_rows - 1) / mk::matmul_rows;
  const int64_t left_bytes = loops.left_bytes(a.K), grain = 1 + (1 << 20) / (mk::matmul_rows * (a.K + 1));

  void* const right = mk::workspace(loops.right_bytes(a.K, a.N), mk::shared_slot);
  if (!right) return mk::no_memory(function);
  int status =
      mk::parallel_for(groups, 1 + (1 << 16) / (mk::matmul_columns * (a.K + 1)), [&](int64_t begin, int64_t end) {
        const int64_t last = end * mk::matmul_columns;
        loops.pack_right(a, begin * mk::matmul_columns, last < a.N ? last : a.N, right);
      });
  if (status) return status;

  // Panels have equal numbers of steps, since a short panel would leave threads idle.
  const auto first_row = [&](int64_t panel) {
    const int64_t step = mk::matmul_row_step, row = (a.M * panel / panels + step - 1) / step * step;
    return row < a.M ? row : a.M;
  };
  std::atomic<bool> failed{false};
  status = mk::parallel_for(panels * groups, grain, [&](int64_t begin, int64_t end) {
    void* const left = mk::workspace(left_bytes);
    if (!left) failed = true;
    for (int64_t i = begin; left && i < end; ++i) {
      const int64_t group = i % groups, row = first_row(i / groups), rows = first_row(i / groups + 1) - row;
      if (i == begin || group == 0) loops.pack_left(a, row, rows, left);
      loops.block(a, left, right, row, rows, group * mk::matmul_columns);
    }
  });
  return failed ? mk::no_memory(function) : status;
}

}  // namespace

MK_DEFINE(mk_matmul, matmul)
