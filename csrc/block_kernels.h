// LayerNorm of a sum over the features of (B, H, L), and the gate; read once per level by
// dispatch.h.
//
// A tile holds all features of a few columns. The first pass over memory adds and keeps the sum in
// scratch memory, later passes stay in the cache. With s = x + y and means over the features,
//
//     n = (s - mean) rstd,   out = n weight + bias + shift,   rstd = 1 / sqrt(var + eps)
//     ds = rstd (weight g - mean(weight g) - n mean(weight g n))
//
// The variance is taken about the rounded mean and corrected for its rounding, so that a mean far
// above the spread costs no digits.

#include "vecmath.h"

template <class T>
SSSD_INLINE Lanes<T> read(const T* from) {
  return load(from);
}

template <class T>
SSSD_INLINE void write(T* to, Lanes<T> value) {
  store(to, value);
}

typedef uint32_t Words __attribute__((vector_size(SSSD_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(SSSD_BYTES / 2)));

SSSD_INLINE Lanes<float> read(const sssd::Bf16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return bits_as<Lanes<float>>(__builtin_convertvector(halves, Words) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
SSSD_INLINE void write(sssd::Bf16* to, Lanes<float> value) {
  const Words bits = bits_as<Words>(value);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words words = value == value ? rounded : Words{} + 0x7fc0;
  const Halves halves = __builtin_convertvector(words, Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// The first `count` values, zeros behind them; `count` below the number of lanes.
template <class T, class S>
SSSD_INLINE Lanes<T> read_some(const S* from, int64_t count) {
  S values[LANES<T>] = {};
  for (int64_t i = 0; i < count; ++i) {
    values[i] = from[i];
  }
  return read(static_cast<const S*>(values));
}

template <class T, class S>
SSSD_INLINE void write_some(S* to, Lanes<T> value, int64_t count) {
  S values[LANES<T>];
  write(static_cast<S*>(values), value);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = values[i];
  }
}

template <class T>
SSSD_INLINE T sum_of(Lanes<T> value) {
  T total = 0;
  for (int64_t i = 0; i < LANES<T>; ++i) {
    total += value[i];
  }
  return total;
}

// Normalises columns l0 .. l0 + count of record b; mean and rstd are (B, L).
template <class T, class S>
void norm_forward_tile(
    const sssd::NormProblem<T, S>& problem, const T* bias, const T* shift, T eps, int64_t b,
    int64_t l0, int64_t count, T* __restrict scratch, S* __restrict out, T* __restrict mean,
    T* __restrict rstd) {
  typedef Lanes<T> V;
  constexpr int64_t N = LANES<T>;
  const int64_t H = problem.H, L = problem.L, whole = count / N * N, rest = count - whole;
  const int64_t width = (count + N - 1) / N * N;
  const T share = T(1) / static_cast<T>(H);
  T* __restrict tile = scratch;
  T* __restrict centre = scratch + H * width;
  T* __restrict scale = centre + width;
  for (int64_t i = 0; i < width; ++i) {
    centre[i] = 0;
  }
  for (int64_t h = 0; h < H; ++h) {
    const S* x = problem.x + (b * H + h) * L + l0;
    const S* y = problem.y + (b * H + h) * L + l0;
    T* row = tile + h * width;
    for (int64_t i = 0; i < whole; i += N) {
      const V s = read(x + i) + read(y + i);
      store(row + i, s);
      store(centre + i, load(centre + i) + s);
    }
    if (rest) {
      const V s = read_some<T>(x + whole, rest) + read_some<T>(y + whole, rest);
      store(row + whole, s);
      store(centre + whole, load(centre + whole) + s);
    }
  }
  for (int64_t i = 0; i < width; i += N) {
    const V about = load(centre + i) * share;
    V first[2] = {}, second[2] = {};
    for (int64_t h = 0; h < H; ++h) {
      const V d = load(tile + h * width + i) - about;
      first[h & 1] += d;
      second[h & 1] += d * d;
    }
    const V slip = (first[0] + first[1]) * share;
    V variance = (second[0] + second[1]) * share - slip * slip + eps;
    for (int64_t j = 0; j < N; ++j) {
      const T root = sizeof(T) == 4 ? __builtin_sqrtf(variance[j]) : __builtin_sqrt(variance[j]);
      variance[j] = 1 / root;
    }
    store(centre + i, about + slip);
    store(scale + i, variance);
  }
  for (int64_t i = 0; i < count; ++i) {
    mean[b * L + l0 + i] = centre[i];
    rstd[b * L + l0 + i] = scale[i];
  }
  for (int64_t h = 0; h < H; ++h) {
    const T weight = problem.weight[h];
    const T offset = bias[h] + (shift ? shift[b * H + h] : T(0));
    const T* row = tile + h * width;
    S* to = out + (b * H + h) * L + l0;
    for (int64_t i = 0; i < whole; i += N) {
      write(to + i, (load(row + i) - load(centre + i)) * (load(scale + i) * weight) + offset);
    }
    if (rest) {
      const V n = (load(row + whole) - load(centre + whole)) * (load(scale + whole) * weight);
      write_some<T>(to + whole, n + offset, rest);
    }
  }
}

// One vector of the backward's first pass: keeps n and adds up what columns and rows need.
template <class T>
SSSD_INLINE void norm_collect(
    Lanes<T> s, Lanes<T> g, T weight, const T* mean, const T* rstd, T* row, T* plain, T* along,
    Lanes<T>* dweight, Lanes<T>* dshift) {
  const Lanes<T> n = (s - load(mean)) * load(rstd), gn = g * n;
  store(row, n);
  *dshift += g;
  *dweight += gn;
  store(plain, load(plain) + g * weight);
  store(along, load(along) + gn * weight);
}

// The gradient of columns l0 .. l0 + count of record b; dweight and dshift (H,) are this tile's.
template <class T, class S>
void norm_backward_tile(
    const sssd::NormProblem<T, S>& problem, const S* g_, const T* mean_, const T* rstd_, int64_t b,
    int64_t l0, int64_t count, T* __restrict scratch, S* __restrict dsum, T* __restrict dweight,
    T* __restrict dshift) {
  typedef Lanes<T> V;
  constexpr int64_t N = LANES<T>;
  const int64_t H = problem.H, L = problem.L, whole = count / N * N, rest = count - whole;
  const int64_t width = (count + N - 1) / N * N;
  const T share = T(1) / static_cast<T>(H);
  T* __restrict tile = scratch;
  T* __restrict mean = scratch + H * width;
  T* __restrict rstd = mean + width;
  T* __restrict plain = rstd + width;
  T* __restrict along = plain + width;
  for (int64_t i = 0; i < width; ++i) {
    mean[i] = i < count ? mean_[b * L + l0 + i] : T(0);
    rstd[i] = i < count ? rstd_[b * L + l0 + i] : T(0);
    plain[i] = along[i] = 0;
  }
  for (int64_t h = 0; h < H; ++h) {
    const int64_t start = (b * H + h) * L + l0;
    const S *x = problem.x + start, *y = problem.y + start, *g = g_ + start;
    const T weight = problem.weight[h];
    T* row = tile + h * width;
    V dw = {}, ds = {};
    for (int64_t i = 0; i < whole; i += N) {
      norm_collect<T>(
          read(x + i) + read(y + i), read(g + i), weight, mean + i, rstd + i, row + i, plain + i,
          along + i, &dw, &ds);
    }
    if (rest) {
      norm_collect<T>(
          read_some<T>(x + whole, rest) + read_some<T>(y + whole, rest),
          read_some<T>(g + whole, rest), weight, mean + whole, rstd + whole, row + whole,
          plain + whole, along + whole, &dw, &ds);
    }
    dweight[h] = sum_of<T>(dw);
    dshift[h] = sum_of<T>(ds);
  }
  for (int64_t i = 0; i < width; i += N) {
    store(plain + i, load(plain + i) * share);
    store(along + i, load(along + i) * share);
  }
  for (int64_t h = 0; h < H; ++h) {
    const int64_t start = (b * H + h) * L + l0;
    const S* g = g_ + start;
    S* to = dsum + start;
    const T weight = problem.weight[h];
    const T* row = tile + h * width;
    for (int64_t i = 0; i < whole; i += N) {
      const V inner = read(g + i) * weight - load(plain + i) - load(row + i) * load(along + i);
      write(to + i, inner * load(rstd + i));
    }
    if (rest) {
      const V inner = read_some<T>(g + whole, rest) * weight - load(plain + whole) -
          load(row + whole) * load(along + whole);
      write_some<T>(to + whole, inner * load(rstd + whole), rest);
    }
  }
}

// e^x - 1 for |x| <= 40, beyond which tanh(x / 2) is 1; the steps are those of exponential_of,
// but 1 is taken from the power of two alone, so that small x keep their digits.
SSSD_INLINE Lanes<float> growth(Lanes<float> x) {
  typedef Lanes<float> V;
  typedef Lanes<int32_t> I;
  x = x < V{} - 40.0f ? V{} - 40.0f : x;
  x = x > V{} + 40.0f ? V{} + 40.0f : x;
  const V shifted = x * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = r * 1.38144311e-3f + 8.36879667e-3f;
  p = p * r + 4.16683964e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * (r * r) + r;
  const V power = bits_as<V>((bits_as<I>(shifted) - 0x4b400000 + 127) << 23);
  return p * power + (power - 1.0f);
}

SSSD_INLINE Lanes<double> growth(Lanes<double> x) {
  for (int64_t i = 0; i < LANES<double>; ++i) {
    const double held = x[i] > 40.0 ? 40.0 : x[i];
    x[i] = __builtin_expm1(held);
  }
  return x;
}

// e^-x, finite.
template <class T>
SSSD_INLINE Lanes<T> decay(Lanes<T> x) {
  const Lanes<T> least = fill<T>(sizeof(T) == 4 ? -80 : -700);
  return exponential(-(x < least ? least : x));
}

// tanh(a) = m / (m + 2) with m = e^2a - 1, and sigmoid(c) = 1 / (1 + e^-c).
template <class T>
SSSD_INLINE Lanes<T> gated(Lanes<T> a, Lanes<T> c) {
  const Lanes<T> m = growth(a + a);
  return m / ((m + T(2)) * (decay<T>(c) + T(1)));
}

template <class T>
SSSD_INLINE void ungated(Lanes<T> g, Lanes<T>* a, Lanes<T>* c) {
  const Lanes<T> m = growth(*a + *a), e = decay<T>(*c);
  const Lanes<T> u = T(1) / (m + T(2)), s = T(1) / (e + T(1));
  const Lanes<T> gs = g * s;
  *a = gs * (T(4) * (m + T(1)) * u * u);
  *c = gs * (m * u) * (e * s);
}

template <class T, class S>
void gate_forward_row(const S* a, const S* c, int64_t count, S* __restrict out) {
  const int64_t whole = count / LANES<T> * LANES<T>, rest = count - whole;
  for (int64_t i = 0; i < whole; i += LANES<T>) {
    write(out + i, gated<T>(read(a + i), read(c + i)));
  }
  if (rest) {
    const Lanes<T> value =
        gated<T>(read_some<T>(a + whole, rest), read_some<T>(c + whole, rest));
    write_some<T>(out + whole, value, rest);
  }
}

template <class T, class S>
void gate_backward_row(
    const S* g, const S* a, const S* c, int64_t count, S* __restrict da, S* __restrict dc) {
  typedef Lanes<T> V;
  const int64_t whole = count / LANES<T> * LANES<T>, rest = count - whole;
  for (int64_t i = 0; i < whole; i += LANES<T>) {
    V signal = read(a + i), control = read(c + i);
    ungated<T>(read(g + i), &signal, &control);
    write(da + i, signal);
    write(dc + i, control);
  }
  if (rest) {
    V signal = read_some<T>(a + whole, rest), control = read_some<T>(c + whole, rest);
    ungated<T>(read_some<T>(g + whole, rest), &signal, &control);
    write_some<T>(da + whole, signal, rest);
    write_some<T>(dc + whole, control, rest);
  }
}
