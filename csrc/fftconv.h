// The plan of the convolution for one length: what fftconv.cpp prepares and the kernels read.

#ifndef SSSD_FFTCONV_H
#define SSSD_FFTCONV_H

#include <cstdint>

namespace sssd {

// Features worked on side by side: one cache line of values, at every level of instructions.
template <class T>
constexpr int64_t kFftconvLanes = 64 / static_cast<int64_t>(sizeof(T));

// The real circle has 2N samples, transformed as N complex points. Stage s splits blocks of size[s]
// points into radix[s] blocks of size[s + 1]; only stage 0 reaches beyond a block of size[1].
template <class T>
struct FftconvPlan {
  static constexpr int kMaxStages = 40;

  int64_t L, N;
  int stages;
  int64_t radix[kMaxStages], size[kMaxStages + 1];
  // twiddle[s]: cos and sin of -2 pi j q / size[s], at [j][q - 1], j < size[s + 1], 0 < q < radix.
  const T* twiddle[kMaxStages];

  // Entry e of the spectrum is a frequency k <= N / 2, found with -k at these points after the
  // transform. Entries of the first-stage blocks b and -b are begin[b] .. begin[b + 1] - 1.
  int64_t entries, blocks;
  const int32_t *point, *mirror;
  const int64_t* begin;
  // turn: cos and sin of -2 pi k / N.
  const T* turn;

  // Values of scratch for one transform.
  int64_t scratch() const {
    return 2 * N * kFftconvLanes<T>;
  }
};

} // namespace sssd

#endif // SSSD_FFTCONV_H
