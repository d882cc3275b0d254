// What the NPLR kernels work on; see nplr_kernels.h for the formulas.

#ifndef SSSD_NPLR_H
#define SSSD_NPLR_H

#include <cstdint>

namespace sssd {

// Nodes that are worked on at a time: a few vectors of any level, and 32 states stay in the
// smallest cache.
template <class T>
constexpr int64_t kNplrTile = 256 / static_cast<int64_t>(sizeof(T));

// Values of the widest vector.
template <class T>
constexpr int64_t kNplrLanes = 64 / static_cast<int64_t>(sizeof(T));

template <class T>
struct NplrProblem {
  const T* a;  // (2, J, H, N2), J = channels + 1 where gamma is null, else channels
  const T* b;  // (2, J, H, N2)
  const T* wr;  // (H, N2)
  const T* wi;  // (H, N2)
  const T* c;  // (F,)
  const T* s;  // (F,)
  const T* gamma;  // (H, F, 2) or null
  int64_t channels;
  int64_t H;
  int64_t N2;
  int64_t F;

  // Products of a feature: those of B and of P with every C and, without gamma, with Q.
  int64_t products() const {
    return 2 * channels + (gamma ? 0 : 2);
  }

  // Values of scratch memory that a thread needs.
  int64_t forward_scratch() const {
    return 2 * products() * N2 + (2 + 2 * N2 + 2 * products() + 4) * kNplrTile<T>;
  }

  int64_t backward_scratch() const {
    return forward_scratch() + 4 * (products() + 1) * kNplrTile<T> +
        2 * (products() + 1) * N2 * kNplrLanes<T>;
  }
};

} // namespace sssd

#endif // SSSD_NPLR_H
