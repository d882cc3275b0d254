// One kernel source, compiled for several widths of vector registers; one of them runs.
//
// How to use it, in a file `x.cpp` whose loops stand in `x_kernels.h`:
//
//     #include <torch/library.h>              // every other include first
//     #define SSSD_KERNELS "x_kernels.h"
//     #include "dispatch.h"
//
//     at::Tensor x_forward(const at::Tensor& u) {
//       auto* kernel = SSSD_BEST(x_row<float>);      // a pointer to the widest version this
//       at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {   // processor can run
//         for (int64_t row = begin; row < end; ++row) kernel(...);
//       });
//     }
//
// `x_kernels.h` has no include guard and no #include: it is read once per level, inside a namespace
// of its own. It holds functions and templates over plain pointers, with loops that the compiler
// vectorises (`#pragma omp simd`) or with the vector type `Lanes<T>` below. It must not use lambdas
// (they would lose the level) nor anything of the standard library or of torch: an inline function
// compiled for AVX-512 could be the copy that the linker keeps for every caller. Builtins such as
// __builtin_fma, __builtin_sqrt and __builtin_memcpy are fine. Inside it
//     SSSD_BYTES     width of a vector register, 16, 32 or 64
//     Lanes<T>       a vector of SSSD_BYTES / sizeof(T) values with + - * / and [], by the compiler
//     LANES<T>       how many values that is
//     load, store, fill (unaligned) move a Lanes<T> from and to memory and repeat one value.
// Multiplications and additions are fused where the level has FMA.
//
// The levels are baseline (whatever the compiler targets: SSE2 on x86-64, NEON on Arm), avx2 (with
// FMA) and avx512. SSSD_HPC_CPU=baseline|avx2|avx512 in the environment forces one that the
// processor has; the op sssd_hpc_cpp::set_cpu_level does the same in a running process.

#ifndef SSSD_DISPATCH_H
#define SSSD_DISPATCH_H

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define SSSD_X86 1
#else
#define SSSD_X86 0
#endif

namespace sssd {

enum class Level : int { baseline = 0, avx2 = 1, avx512 = 2 };

constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512"};

// The widest level that processor and operating system support.
inline Level widest_level() {
#if SSSD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return wide ? Level::avx512 : Level::avx2;
  }
#endif
  return Level::baseline;
}

inline Level level_named(const std::string& name, const char* source) {
  std::string allowed;
  for (int i = 0; i <= static_cast<int>(widest_level()); ++i) {
    if (name == kLevelNames[i]) {
      return static_cast<Level>(i);
    }
    allowed += std::string(i ? ", " : "") + kLevelNames[i];
  }
  TORCH_CHECK(false, source, " is '", name, "'; this processor runs ", allowed);
}

// Decided at the first use, so that a wrong SSSD_HPC_CPU is an error of the op that meets it.
inline std::atomic<Level>& level() {
  static std::atomic<Level> chosen{[] {
    const char* wish = std::getenv("SSSD_HPC_CPU");
    return wish && *wish ? level_named(wish, "SSSD_HPC_CPU") : widest_level();
  }()};
  return chosen;
}

} // namespace sssd

#if SSSD_X86
// Variadic, because the name of a template instance may contain commas.
#define SSSD_BEST(...)                                        \
  (::sssd::level() == ::sssd::Level::avx512 ? &avx512::__VA_ARGS__ \
   : ::sssd::level() == ::sssd::Level::avx2 ? &avx2::__VA_ARGS__   \
                                            : &baseline::__VA_ARGS__)
#else
#define SSSD_BEST(...) (&baseline::__VA_ARGS__)
#endif

#define SSSD_INLINE static inline __attribute__((always_inline))

#endif // SSSD_DISPATCH_H

#ifdef SSSD_KERNELS

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are passed between inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define SSSD_BYTES 16
namespace {
namespace baseline {
#include "lanes.h"
#include SSSD_KERNELS
} // namespace baseline
} // namespace
#undef SSSD_BYTES

#if SSSD_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SSSD_BYTES 32
namespace {
namespace avx2 {
#include "lanes.h"
#include SSSD_KERNELS
} // namespace avx2
} // namespace
#undef SSSD_BYTES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define SSSD_BYTES 64
namespace {
namespace avx512 {
#include "lanes.h"
#include SSSD_KERNELS
} // namespace avx512
} // namespace
#undef SSSD_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif // SSSD_X86

#undef SSSD_KERNELS
#endif // SSSD_KERNELS
