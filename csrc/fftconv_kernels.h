// The convolution of one group of features; read once per level by dispatch.h.
//
// A group is WIDTH = 64 / sizeof(T) features of one batch entry. Their rows are transposed, so that
// every number of the transform is a cache line, one value a feature: the transform is scalar code
// on vectors, without shuffles, and a NaN of one feature cannot reach another.
//
// A real row x of 2N samples is the complex row z_m = x_2m + i x_2m+1. With E and O the spectra of
// the even and odd samples and W = e^{-2 pi i k / N}, the product with a kernel is
//
//     Y_even = K_even E + W K_odd O,   Y_odd = K_odd E + K_even O,   0 <= k <= N / 2
//
// which needs no spectrum of 2N points. The forward transform decimates in frequency and leaves its
// result in the order of reversed digits, where the inverse takes it: nothing is reordered, and
// each pair of first-stage blocks is finished, product included, while it is in the cache. Half of the
// input is padding and half of the output is dropped: the first and the last stage skip them.
//
// The inverse runs on swapped real and imaginary planes, which makes it the same arithmetic; its
// result is unswapped where the rows are written.

#include "vecmath.h"

template <class T>
constexpr int64_t WIDTH = sssd::kFftconvLanes<T>;

template <class T>
struct Complex {
  Lanes<T> re, im;
};

template <class T>
SSSD_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}

template <class T>
SSSD_INLINE Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}

template <class T>
SSSD_INLINE Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// conj(a) b
template <class T>
SSSD_INLINE Complex<T> correlate(Complex<T> a, Complex<T> b) {
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}

template <class T>
SSSD_INLINE Complex<T> times_minus_i(Complex<T> a) {
  return {a.im, -a.re};
}

template <class T>
SSSD_INLINE Complex<T> load_point(const T* from) {
  return {load(from), load(from + WIDTH<T>)};
}

template <class T>
SSSD_INLINE void store_point(T* to, Complex<T> value) {
  store(to, value.re);
  store(to + WIDTH<T>, value.im);
}

// Multiplies points 1, 3 of b = (b_0, .., b_3) by e^{-i pi / 4}, e^{-3 i pi / 4} and point 2 by -i.
template <class T>
SSSD_INLINE void turn_eighths(Complex<T>* b) {
  const T half = static_cast<T>(0.70710678118654752440);
  b[1] = {(b[1].re + b[1].im) * half, (b[1].im - b[1].re) * half};
  b[2] = times_minus_i(b[2]);
  b[3] = {(b[3].im - b[3].re) * half, (b[3].re + b[3].im) * -half};
}

template <class T>
SSSD_INLINE void dft4(Complex<T>* x) {
  const Complex<T> sum = x[0] + x[2], difference = x[0] - x[2], odd = x[1] + x[3];
  const Complex<T> turned = times_minus_i(x[1] - x[3]);
  x[0] = sum + odd;
  x[1] = difference + turned;
  x[2] = sum - odd;
  x[3] = difference - turned;
}

template <class T>
SSSD_INLINE void dft3(Complex<T>* x) {
  const T sine = static_cast<T>(0.86602540378443864676);
  const Complex<T> sum = x[1] + x[2];
  const Complex<T> d = times_minus_i(x[1] - x[2]);
  const Complex<T> turned = {d.re * sine, d.im * sine};
  const Complex<T> mean = {x[0].re - sum.re * T(0.5), x[0].im - sum.im * T(0.5)};
  x[0] = x[0] + sum;
  x[1] = mean + turned;
  x[2] = mean - turned;
}

template <class T>
SSSD_INLINE void dft5(Complex<T>* x) {
  const T c1 = static_cast<T>(0.30901699437494742410), c2 = static_cast<T>(-0.80901699437494742410);
  const T s1 = static_cast<T>(0.95105651629515357212), s2 = static_cast<T>(0.58778525229247312917);
  const Complex<T> p = x[1] + x[4], m = times_minus_i(x[1] - x[4]);
  const Complex<T> q = x[2] + x[3], n = times_minus_i(x[2] - x[3]);
  const Complex<T> a = {
      x[0].re + p.re * c1 + q.re * c2, x[0].im + p.im * c1 + q.im * c2};
  const Complex<T> b = {
      x[0].re + p.re * c2 + q.re * c1, x[0].im + p.im * c2 + q.im * c1};
  const Complex<T> c = {m.re * s1 + n.re * s2, m.im * s1 + n.im * s2};
  const Complex<T> d = {m.re * s2 - n.re * s1, m.im * s2 - n.im * s1};
  x[0] = x[0] + p + q;
  x[1] = a + c;
  x[2] = b + d;
  x[3] = b - d;
  x[4] = a - c;
}

// The transform of R points. HALF: the upper half of the input is zero and not read.
template <class T, int R, bool HALF>
SSSD_INLINE void dft_from(Complex<T>* x) {
  if constexpr (R == 3) {
    dft3(x);
  } else if constexpr (R == 5) {
    dft5(x);
  } else if constexpr (R == 2) {
    const Complex<T> a = x[0];
    x[0] = HALF ? a : a + x[1];
    x[1] = HALF ? a : a - x[1];
  } else if constexpr (R == 4) {
    if constexpr (HALF) {
      const Complex<T> a = x[0], b = x[1], turned = times_minus_i(x[1]);
      x[0] = a + b;
      x[1] = a + turned;
      x[2] = a - b;
      x[3] = a - turned;
    } else {
      dft4(x);
    }
  } else {
    Complex<T> a[4], b[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      a[q] = HALF ? x[q] : x[q] + x[q + 4];
      b[q] = HALF ? x[q] : x[q] - x[q + 4];
    }
    turn_eighths(b);
    dft4(a);
    dft4(b);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      x[2 * q] = a[q];
      x[2 * q + 1] = b[q];
    }
  }
}

// The same. HALF: the upper half of the output is not wanted.
template <class T, int R, bool HALF>
SSSD_INLINE void dft_to(Complex<T>* x) {
  if constexpr (R == 8) {
    Complex<T> a[4] = {x[0], x[2], x[4], x[6]}, b[4] = {x[1], x[3], x[5], x[7]};
    dft4(a);
    dft4(b);
    turn_eighths(b);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      x[q] = a[q] + b[q];
      x[q + 4] = a[q] - b[q];
    }
  } else {
    // What is not stored, the compiler leaves out.
    dft_from<T, R, false>(x);
  }
}

// One stage, in place, on `count` blocks of R M points, one after the other: transform, then turn
// (decimation in frequency). LEAF: M is 1 and all twiddles are 1.
template <class T, int R, bool HALF, bool LEAF>
void fftconv_split(T* z, int64_t count, int64_t M, const T* twiddle) {
  constexpr int64_t P = 2 * WIDTH<T>;
  for (int64_t block = 0; block < count; ++block, z += R * M * P) {
    const T* factor = twiddle;
    for (int64_t j = 0; j < M; ++j, factor += 2 * (R - 1)) {
      for (int64_t lane = 0; lane < WIDTH<T>; lane += LANES<T>) {
        T* at = z + j * P + lane;
        Complex<T> x[R];
#pragma GCC unroll 8
        for (int q = 0; q < (HALF ? R / 2 : R); ++q) {
          x[q] = load_point(at + q * M * P);
        }
        dft_from<T, R, HALF>(x);
        store_point(at, x[0]);
#pragma GCC unroll 8
        for (int q = 1; q < R; ++q) {
          if constexpr (!LEAF) {
            x[q] = x[q] * Complex<T>{fill(factor[2 * q - 2]), fill(factor[2 * q - 1])};
          }
          store_point(at + q * M * P, x[q]);
        }
      }
    }
  }
}

// The mirror image: turn, then transform (decimation in time).
template <class T, int R, bool HALF, bool LEAF>
void fftconv_join(T* z, int64_t count, int64_t M, const T* twiddle) {
  constexpr int64_t P = 2 * WIDTH<T>;
  for (int64_t block = 0; block < count; ++block, z += R * M * P) {
    const T* factor = twiddle;
    for (int64_t j = 0; j < M; ++j, factor += 2 * (R - 1)) {
      for (int64_t lane = 0; lane < WIDTH<T>; lane += LANES<T>) {
        T* at = z + j * P + lane;
        Complex<T> x[R];
        x[0] = load_point(at);
#pragma GCC unroll 8
        for (int q = 1; q < R; ++q) {
          x[q] = load_point(at + q * M * P);
          if constexpr (!LEAF) {
            x[q] = x[q] * Complex<T>{fill(factor[2 * q - 2]), fill(factor[2 * q - 1])};
          }
        }
        dft_to<T, R, HALF>(x);
#pragma GCC unroll 8
        for (int q = 0; q < (HALF ? R / 2 : R); ++q) {
          store_point(at + q * M * P, x[q]);
        }
      }
    }
  }
}

template <class T, int R, bool SPLIT>
void fftconv_stage(T* z, int64_t count, int64_t M, const T* twiddle) {
  if (M == 1) {
    SPLIT ? fftconv_split<T, R, false, true>(z, count, M, twiddle)
          : fftconv_join<T, R, false, true>(z, count, M, twiddle);
  } else {
    SPLIT ? fftconv_split<T, R, false, false>(z, count, M, twiddle)
          : fftconv_join<T, R, false, false>(z, count, M, twiddle);
  }
}

// Stage s on the points from z on, which hold `count` blocks.
template <class T, bool SPLIT>
void fftconv_any_stage(const sssd::FftconvPlan<T>& plan, int s, T* z, int64_t count) {
  const int64_t M = plan.size[s + 1];
  const T* twiddle = plan.twiddle[s];
  switch (plan.radix[s]) {
    case 2:
      return fftconv_stage<T, 2, SPLIT>(z, count, M, twiddle);
    case 3:
      return fftconv_stage<T, 3, SPLIT>(z, count, M, twiddle);
    case 4:
      return fftconv_stage<T, 4, SPLIT>(z, count, M, twiddle);
    case 5:
      return fftconv_stage<T, 5, SPLIT>(z, count, M, twiddle);
    default:
      return fftconv_stage<T, 8, SPLIT>(z, count, M, twiddle);
  }
}

// Whether rows of L samples fill at most the half of the points that an even first stage reads.
template <class T>
SSSD_INLINE bool halved(const sssd::FftconvPlan<T>& plan) {
  return plan.N % 2 == 0;
}

// The first stage of rows that end at sample L (SPLIT), or the last one where only they are wanted.
template <class T, bool SPLIT>
void fftconv_outer_half(const sssd::FftconvPlan<T>& plan, T* z) {
  const int64_t M = plan.size[1];
  const T* twiddle = plan.twiddle[0];
  switch (plan.radix[0]) {
    case 2:
      return SPLIT ? fftconv_split<T, 2, true, false>(z, 1, M, twiddle)
                   : fftconv_join<T, 2, true, false>(z, 1, M, twiddle);
    case 4:
      return SPLIT ? fftconv_split<T, 4, true, false>(z, 1, M, twiddle)
                   : fftconv_join<T, 4, true, false>(z, 1, M, twiddle);
    default:
      return SPLIT ? fftconv_split<T, 8, true, false>(z, 1, M, twiddle)
                   : fftconv_join<T, 8, true, false>(z, 1, M, twiddle);
  }
}

template <class T, bool SPLIT>
void fftconv_outer(const sssd::FftconvPlan<T>& plan, T* z, bool half) {
  if (plan.stages == 0) {
    return;
  }
  if (half && halved(plan)) {
    fftconv_outer_half<T, SPLIT>(plan, z);
  } else {
    fftconv_any_stage<T, SPLIT>(plan, 0, z, 1);
  }
}

// All later stages of first-stage block b and of block -b, with whose frequencies its own pair.
template <class T, bool SPLIT>
void fftconv_inner(const sssd::FftconvPlan<T>& plan, T* z, int64_t b) {
  if (plan.stages == 0) {
    return;
  }
  const int64_t M = plan.size[1], other = (plan.blocks - b) % plan.blocks;
  for (int64_t block = b;; block = other) {
    T* at = z + block * M * 2 * WIDTH<T>;
    for (int i = 1; i < plan.stages; ++i) {
      const int s = SPLIT ? i : plan.stages - i;
      fftconv_any_stage<T, SPLIT>(plan, s, at, M / plan.size[s]);
    }
    if (block == other) {
      return;
    }
  }
}

// The doubled spectra of the even and the odd samples at one frequency.
template <class T>
struct Halves {
  Complex<T> even, odd;
};

// From the transform z at k and its mirror at -k.
template <class T>
SSSD_INLINE Halves<T> halves_of(Complex<T> z, Complex<T> mirror) {
  return {
      {z.re + mirror.re, z.im - mirror.im},
      {z.im + mirror.im, mirror.re - z.re},
  };
}

// Stores even + i odd at k and its mirror, planes swapped for the inverse.
template <class T>
SSSD_INLINE void store_halves(T* point, T* mirror, Complex<T> even, Complex<T> odd) {
  store_point(point, Complex<T>{even.im + odd.re, even.re - odd.im});
  store_point(mirror, Complex<T>{odd.re - even.im, even.re + odd.im});
}

// The frequencies 0 and N / 2 are their own mirrors: E, O, K and W are real there, and what K holds
// for an imaginary part takes no part.
template <class T>
SSSD_INLINE Complex<T> real_part(Complex<T> z) {
  return {z.re, Lanes<T>{}};
}

template <class T>
SSSD_INLINE Complex<T> turn_of(const sssd::FftconvPlan<T>& plan, int64_t entry) {
  return {fill(plan.turn[2 * entry]), fill(plan.turn[2 * entry + 1])};
}

// The spectrum of a group: per entry K_even and K_odd, each a real and an imaginary line.
template <class T>
void fftconv_multiply(const sssd::FftconvPlan<T>& plan, int64_t b, const T* K, T* z) {
  constexpr int64_t P = 2 * WIDTH<T>;
  for (int64_t e = plan.begin[b]; e < plan.begin[b + 1]; ++e) {
    for (int64_t lane = 0; lane < WIDTH<T>; lane += LANES<T>) {
      T* point = z + plan.point[e] * P + lane;
      T* mirror = z + plan.mirror[e] * P + lane;
      const T* k = K + 2 * e * P + lane;
      Complex<T> k_even = load_point(k), k_odd = load_point(k + P);
      if (point == mirror) {
        k_even = real_part(k_even);
        k_odd = real_part(k_odd);
      }
      const Halves<T> u = halves_of(load_point(point), load_point(mirror));
      const Complex<T> delayed = turn_of(plan, e) * u.odd;
      store_halves(
          point, mirror, k_even * u.even + k_odd * delayed, k_odd * u.even + k_even * u.odd);
    }
  }
}

// Adds conj(U) G to dK and puts the spectrum of du in the place of g.
template <class T>
void fftconv_multiply_backward(
    const sssd::FftconvPlan<T>& plan, int64_t b, const T* K, const T* z, T* g, T* dK) {
  constexpr int64_t P = 2 * WIDTH<T>;
  for (int64_t e = plan.begin[b]; e < plan.begin[b + 1]; ++e) {
    for (int64_t lane = 0; lane < WIDTH<T>; lane += LANES<T>) {
      const int64_t point = plan.point[e] * P + lane, mirror = plan.mirror[e] * P + lane;
      const T* k = K + 2 * e * P + lane;
      T* dk = dK + 2 * e * P + lane;
      Complex<T> k_even = load_point(k), k_odd = load_point(k + P);
      const Complex<T> turn = turn_of(plan, e);
      const Halves<T> u = halves_of(load_point(z + point), load_point(z + mirror));
      const Halves<T> y = halves_of(load_point(g + point), load_point(g + mirror));
      Complex<T> d_even = correlate(u.even, y.even) + correlate(u.odd, y.odd);
      Complex<T> d_odd = correlate(turn * u.odd, y.even) + correlate(u.even, y.odd);
      if (point == mirror) {
        k_even = real_part(k_even);
        k_odd = real_part(k_odd);
        // A frequency that stands for itself alone counts once, not twice.
        d_even = {d_even.re * T(0.5), Lanes<T>{}};
        d_odd = {d_odd.re * T(0.5), Lanes<T>{}};
      }
      store_point(dk, load_point(dk) + d_even);
      store_point(dk + P, load_point(dk + P) + d_odd);
      store_halves(
          g + point, g + mirror, correlate(k_even, y.even) + correlate(k_odd, y.odd),
          correlate(turn * k_odd, y.even) + correlate(k_even, y.odd));
    }
  }
}

// The transform of a kernel to its spectrum, scaled by what the transforms leave out: 1 / N, and
// twice the 1/2 of the doubled spectra.
template <class T>
void fftconv_keep(const sssd::FftconvPlan<T>& plan, const T* z, T* K) {
  constexpr int64_t P = 2 * WIDTH<T>;
  const Lanes<T> scale = fill(T(0.25) / static_cast<T>(plan.N));
  for (int64_t e = 0; e < plan.entries; ++e) {
    for (int64_t lane = 0; lane < WIDTH<T>; lane += LANES<T>) {
      const Halves<T> k = halves_of(
          load_point(z + plan.point[e] * P + lane), load_point(z + plan.mirror[e] * P + lane));
      T* to = K + 2 * e * P + lane;
      store_point(to, Complex<T>{k.even.re * scale, k.even.im * scale});
      store_point(to + P, Complex<T>{k.odd.re * scale, k.odd.im * scale});
    }
  }
}

template <class T>
void fftconv_keep_backward(const sssd::FftconvPlan<T>& plan, const T* dK, T* z) {
  constexpr int64_t P = 2 * WIDTH<T>;
  for (int64_t e = 0; e < plan.entries; ++e) {
    const bool alone = plan.point[e] == plan.mirror[e];
    const Lanes<T> scale = fill((alone ? T(0.5) : T(0.25)) / static_cast<T>(plan.N));
    for (int64_t lane = 0; lane < WIDTH<T>; lane += LANES<T>) {
      const T* dk = dK + 2 * e * P + lane;
      Complex<T> even = load_point(dk), odd = load_point(dk + P);
      if (alone) {
        even = real_part(even);
        odd = real_part(odd);
      }
      store_halves(
          z + plan.point[e] * P + lane, z + plan.mirror[e] * P + lane,
          Complex<T>{even.re * scale, even.im * scale}, Complex<T>{odd.re * scale, odd.im * scale});
    }
  }
}

// A tile is WIDTH samples of the WIDTH rows of a group, or the same transposed.

#if defined(__clang__) || __GNUC__ >= 12
#define FFTCONV_PICK(a, b, Mask, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FFTCONV_PICK(a, b, Mask, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

typedef float FourFloats __attribute__((vector_size(16)));
typedef double TwoDoubles __attribute__((vector_size(16)));
typedef int32_t FourPicks __attribute__((vector_size(16)));
typedef int64_t TwoPicks __attribute__((vector_size(16)));

SSSD_INLINE void transpose_square(FourFloats (&r)[4]) {
  const FourFloats a = FFTCONV_PICK(r[0], r[1], FourPicks, 0, 4, 1, 5);
  const FourFloats b = FFTCONV_PICK(r[2], r[3], FourPicks, 0, 4, 1, 5);
  const FourFloats c = FFTCONV_PICK(r[0], r[1], FourPicks, 2, 6, 3, 7);
  const FourFloats d = FFTCONV_PICK(r[2], r[3], FourPicks, 2, 6, 3, 7);
  r[0] = FFTCONV_PICK(a, b, FourPicks, 0, 1, 4, 5);
  r[1] = FFTCONV_PICK(a, b, FourPicks, 2, 3, 6, 7);
  r[2] = FFTCONV_PICK(c, d, FourPicks, 0, 1, 4, 5);
  r[3] = FFTCONV_PICK(c, d, FourPicks, 2, 3, 6, 7);
}

SSSD_INLINE void transpose_square(TwoDoubles (&r)[2]) {
  const TwoDoubles a = FFTCONV_PICK(r[0], r[1], TwoPicks, 0, 2);
  r[1] = FFTCONV_PICK(r[0], r[1], TwoPicks, 1, 3);
  r[0] = a;
}

#undef FFTCONV_PICK

template <class T>
struct SquareRow;
template <>
struct SquareRow<float> {
  typedef FourFloats Type;
};
template <>
struct SquareRow<double> {
  typedef TwoDoubles Type;
};

template <class T>
void transpose_tile(const T* from, T* to) {
  constexpr int64_t W = WIDTH<T>, S = 16 / sizeof(T);
  for (int64_t i = 0; i < W; i += S) {
    for (int64_t j = 0; j < W; j += S) {
      typename SquareRow<T>::Type rows[S];
#pragma GCC unroll 4
      for (int64_t r = 0; r < S; ++r) {
        __builtin_memcpy(&rows[r], from + (i + r) * W + j, 16);
      }
      transpose_square(rows);
#pragma GCC unroll 4
      for (int64_t r = 0; r < S; ++r) {
        __builtin_memcpy(to + (j + r) * W + i, &rows[r], 16);
      }
    }
  }
}

// Copies up to WIDTH samples of each row to a tile; what is not there is zero.
template <class T>
void read_tile(const T* from, int64_t rows, int64_t stride, int64_t count, T* tile) {
  constexpr int64_t W = WIDTH<T>;
  for (int64_t r = 0; r < W; ++r, tile += W) {
    if (r < rows && count >= W) {
      __builtin_memcpy(tile, from + r * stride, 64);
    } else {
      for (int64_t i = 0; i < W; ++i) {
        tile[i] = r < rows && i < count ? from[r * stride + i] : T(0);
      }
    }
  }
}

template <class T>
void write_tile(const T* tile, int64_t rows, int64_t stride, int64_t count, T* to) {
  constexpr int64_t W = WIDTH<T>;
  for (int64_t r = 0; r < rows; ++r, tile += W) {
    if (count >= W) {
      __builtin_memcpy(to + r * stride, tile, 64);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        to[r * stride + i] = tile[i];
      }
    }
  }
}

template <class T>
void gelu_tile(T* tile) {
  constexpr int64_t W = WIDTH<T>;
#pragma omp simd
  for (int64_t i = 0; i < W * W; ++i) {
    tile[i] = gelu(tile[i]);
  }
}

// Multiplies a tile of dy by gelu'(x).
template <class T>
void gelu_backward_tile(const T* tile_of_x, T* tile) {
  constexpr int64_t W = WIDTH<T>;
#pragma omp simd
  for (int64_t i = 0; i < W * W; ++i) {
    tile[i] *= gelu_slope(tile_of_x[i]);
  }
}

// Writes `count` samples of each row as lines, sample t as line first + t step, times gelu'(pre)
// unless pre is null.
template <class T>
void read_rows(
    const T* from, const T* pre, int64_t rows, int64_t stride, int64_t count, T* z, int64_t first,
    int64_t step) {
  constexpr int64_t W = WIDTH<T>;
  alignas(64) T tile[W * W], lines[W * W];
  for (int64_t t = 0; t < count; t += W) {
    read_tile(from + t, rows, stride, count - t, tile);
    if (pre) {
      read_tile(pre + t, rows, stride, count - t, lines);
      gelu_backward_tile(lines, tile);
    }
    transpose_tile(tile, lines);
    for (int64_t i = 0; i < W && t + i < count; ++i) {
      __builtin_memcpy(z + (first + (t + i) * step) * W, lines + i * W, 64);
    }
  }
}

// The reverse, from the swapped planes of an inverse; keeps what GELU acts on unless pre is null.
template <class T>
void write_rows(
    const T* z, int64_t first, int64_t step, int64_t rows, int64_t stride, int64_t count, bool gelu,
    T* to, T* pre) {
  constexpr int64_t W = WIDTH<T>;
  alignas(64) T tile[W * W], lines[W * W];
  for (int64_t t = 0; t < count; t += W) {
    for (int64_t i = 0; i < W; ++i) {
      const int64_t line = (first + (t + i < count ? t + i : t) * step) ^ 1;
      __builtin_memcpy(lines + i * W, z + line * W, 64);
    }
    transpose_tile(lines, tile);
    if (pre) {
      write_tile(tile, rows, stride, count - t, pre + t);
    }
    if (gelu) {
      gelu_tile(tile);
    }
    write_tile(tile, rows, stride, count - t, to + t);
  }
}

// Clears lines begin .. end - 1.
template <class T>
void clear_lines(T* z, int64_t begin, int64_t end) {
  for (int64_t i = begin * WIDTH<T>; i < end * WIDTH<T>; ++i) {
    z[i] = T(0);
  }
}

// Rows of L samples to lines, the padding that the first stage reads included.
template <class T>
void read_input(const sssd::FftconvPlan<T>& plan, const T* from, const T* pre, int64_t rows, T* z) {
  read_rows(from, pre, rows, plan.L, plan.L, z, 0, 1);
  clear_lines(z, plan.L, halved(plan) ? plan.N : 2 * plan.N);
}

// y = act(conv(u)) for `rows` features of one batch entry; z is scratch.
template <class T>
void fftconv_forward(
    const sssd::FftconvPlan<T>& plan, const T* u, int64_t rows, const T* K, bool gelu, T* y, T* pre,
    T* z) {
  read_input(plan, u, static_cast<const T*>(nullptr), rows, z);
  fftconv_outer<T, true>(plan, z, true);
  for (int64_t b = 0; b <= plan.blocks / 2; ++b) {
    fftconv_inner<T, true>(plan, z, b);
    fftconv_multiply(plan, b, K, z);
    fftconv_inner<T, false>(plan, z, b);
  }
  fftconv_outer<T, false>(plan, z, true);
  write_rows(z, 0, 1, rows, plan.L, plan.L, gelu, y, pre);
}

// du, and the addition of this batch entry to dK; pre is null without GELU; z and g are scratch.
template <class T>
void fftconv_backward(
    const sssd::FftconvPlan<T>& plan, const T* dy, const T* u, const T* pre, int64_t rows,
    const T* K, T* du, T* dK, T* z, T* g) {
  read_input(plan, u, static_cast<const T*>(nullptr), rows, z);
  read_input(plan, dy, pre, rows, g);
  fftconv_outer<T, true>(plan, z, true);
  fftconv_outer<T, true>(plan, g, true);
  for (int64_t b = 0; b <= plan.blocks / 2; ++b) {
    fftconv_inner<T, true>(plan, z, b);
    fftconv_inner<T, true>(plan, g, b);
    fftconv_multiply_backward(plan, b, K, z, g, dK);
    fftconv_inner<T, false>(plan, g, b);
  }
  fftconv_outer<T, false>(plan, g, true);
  write_rows(g, 0, 1, rows, plan.L, plan.L, false, du, static_cast<T*>(nullptr));
}

// The spectrum K of `rows` features: k0 and k1 their kernels, D their skips. The circle holds k0
// from lag 0 on and k1 from the end backwards; the skip is one more value at lag 0.
template <class T>
void fftconv_prepare(
    const sssd::FftconvPlan<T>& plan, const T* k0, const T* k1, const T* D, int64_t rows, T* K,
    T* z) {
  const int64_t L = plan.L, n = 2 * plan.N;
  read_rows(k0, static_cast<const T*>(nullptr), rows, L, L, z, 0, 1);
  clear_lines(z, L, n - (L - 1));
  read_rows(k1, static_cast<const T*>(nullptr), rows, L, L - 1, z, n - 1, -1);
  for (int64_t r = 0; r < rows; ++r) {
    z[r] += D[r];
  }
  fftconv_outer<T, true>(plan, z, false);
  for (int64_t b = 0; b <= plan.blocks / 2; ++b) {
    fftconv_inner<T, true>(plan, z, b);
  }
  fftconv_keep(plan, z, K);
}

template <class T>
void fftconv_prepare_backward(
    const sssd::FftconvPlan<T>& plan, const T* dK, int64_t rows, T* dk0, T* dk1, T* dD, T* z) {
  const int64_t L = plan.L;
  fftconv_keep_backward(plan, dK, z);
  for (int64_t b = 0; b <= plan.blocks / 2; ++b) {
    fftconv_inner<T, false>(plan, z, b);
  }
  fftconv_outer<T, false>(plan, z, false);
  write_rows(z, 0, 1, rows, L, L, false, dk0, static_cast<T*>(nullptr));
  write_rows(z, 2 * plan.N - 1, -1, rows, L, L - 1, false, dk1, static_cast<T*>(nullptr));
  for (int64_t r = 0; r < rows; ++r) {
    dk1[r * L + L - 1] = T(0);
    dD[r] = dk0[r * L];
  }
}
