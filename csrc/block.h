// What the kernels of the residual block work on; see block_kernels.h for the formulas.

#ifndef SSSD_BLOCK_H
#define SSSD_BLOCK_H

#include <cstdint>

namespace sssd {

// A bfloat16 in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// T is the type of the arithmetic, S that of the signals in memory: T itself or Bf16.
template <class T, class S>
struct NormProblem {
  const S* x;  // (B, H, L)
  const S* y;  // (B, H, L)
  const T* weight;  // (H,)
  int64_t B;
  int64_t H;
  int64_t L;

  // Columns of a tile, multiples of the widest vector: all features of a tile stay in the L2 cache
  // and a row of it is long enough for the memory. A function of the shape alone, because sums
  // over columns are taken tile by tile.
  int64_t width() const {
    const int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t most = kTileBytes / (H * static_cast<int64_t>(sizeof(T))) / line * line;
    const int64_t least = most < line ? line : most;
    const int64_t tiles = (L + least - 1) / least;
    const int64_t even = (L + tiles - 1) / tiles;
    return (even + line - 1) / line * line;
  }

  int64_t tiles() const {
    return (L + width() - 1) / width();
  }

  // Values of scratch memory that a thread needs: a tile and four rows.
  int64_t scratch() const {
    return (H + 4) * width();
  }

  static constexpr int64_t kTileBytes = 192 * 1024;
};

} // namespace sssd

#endif // SSSD_BLOCK_H
