// exp and GELU for every level; for use in a kernels file of dispatch.h: include it there, inside
// the level's namespace (no guard, nothing of the standard library).
//
//     exponential(x)    e^x
//     gelu(x)           x Phi(x), Phi(x) = erfc(-x / sqrt(2)) / 2 the normal distribution
//     gelu_slope(x)     its derivative Phi(x) + x phi(x)
//
// of a float or a double; exponential also of Lanes<T>. No branches for float, so that loops over
// scalars vectorise; doubles go through the C library, one by one. NaN and infinities are as in C.
// Largest errors in float: exponential 1 unit of the last place, subnormal results included; gelu
// 4e-7 of itself for x > 0, 1e-5 for x < 0 (1 + erf would leave no digit) down to x = -12.6, from
// where on it is 0, not -1e-35; gelu_slope 4e-7.

template <class To, class From>
SSSD_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// V is float with I int32_t, or vectors of them. One polynomial for e^r, |r| <= ln(2) / 2, fitted
// for the least relative error (3e-9).
template <class I, class V>
SSSD_INLINE V exponential_of(V x) {
  // Beyond these bounds e^x is 0 or infinite anyway; NaN passes.
  x = x < V{} - 104.0f ? V{} - 104.0f : x;
  x = x > V{} + 89.0f ? V{} + 89.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const V shifted = x * 1.44269504f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  // ln 2 in two parts; the first has nine bits, so that its product with n is exact.
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = r * 1.38144311e-3f + 8.36879667e-3f;
  p = p * r + 4.16683964e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.99999940e-1f;
  p = p * (r * r) + r + 1.0f;
  // Two factors 2^(n/2), because 2^n may not be a normal number where p 2^n is.
  const I whole = bits_as<I>(shifted) - 0x4b400000;
  const I half = whole >> 1;
  return p * bits_as<V>((half + 127) << 23) * bits_as<V>((whole - half + 127) << 23);
}

SSSD_INLINE float exponential(float x) {
  return exponential_of<int32_t>(x);
}

SSSD_INLINE double exponential(double x) {
  return __builtin_exp(x);
}

SSSD_INLINE Lanes<float> exponential(Lanes<float> x) {
  return exponential_of<Lanes<int32_t>>(x);
}

SSSD_INLINE Lanes<double> exponential(Lanes<double> x) {
  for (int64_t i = 0; i < LANES<double>; ++i) {
    x[i] = exponential(x[i]);
  }
  return x;
}

// With a = |x|: bell = e^{-a^2/2} and, returned, Phi(-a) = bell t P(u) where t = 1 / (1 + 0.4 a) and
// u = 1 - t = 0.4 a t. P is fitted for the least error of Phi (2e-8), in u because the rounding of t
// would spoil it near 0. a is cut at 30, since infinity would make a NaN; a NaN passes.
SSSD_INLINE float normal_tail(float x, float* a, float* bell) {
  const float size = __builtin_fabsf(x);
  *a = size > 30.0f ? 30.0f : size;
  // e^{-a^2/2} as in exponential_of, but of n >= -126 only: 1.5 * 2^23 + 127 leaves n + 127 in the
  // low bits, which are the exponent of 2^n.
  const float square = *a * *a;
  const float shifted = square * -0.721347520f + 12583039.0f;
  const float n = shifted - 12583039.0f;
  float r = square * -0.5f - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = r * 1.38144311e-3f + 8.36879667e-3f;
  p = p * r + 4.16683964e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 4.99999940e-1f;
  p = (p * (r * r) + (r + 1.0f)) * bits_as<float>(bits_as<uint32_t>(shifted) << 23);
  *bell = square > 160.0f ? 0.0f : p;
  const float t = 1.0f / (*a * 0.4f + 1.0f);
  const float u = *a * t * 0.4f;
  float q = u * 3.56284529e-2f - 6.75430223e-2f;
  q = q * u - 6.39079884e-3f;
  q = q * u + 8.99923965e-3f;
  q = q * u + 1.18588552e-1f;
  q = q * u + 6.77212775e-2f;
  q = q * u - 4.97354150e-1f;
  q = q * u + 0.5f;
  return *bell * (q * t);
}

SSSD_INLINE float gelu(float x) {
  float a, bell;
  const float tail = normal_tail(x, &a, &bell);
  return (x > 0.0f ? x : 0.0f) - a * tail;
}

SSSD_INLINE double gelu(double x) {
  return 0.5 * x * __builtin_erfc(x * -0.70710678118654752440);
}

SSSD_INLINE float gelu_slope(float x) {
  float a, bell;
  const float tail = normal_tail(x, &a, &bell);
  return (x > 0.0f ? 1.0f - tail : tail) + x * (bell * 0.398942280f);
}

SSSD_INLINE double gelu_slope(double x) {
  return 0.5 * __builtin_erfc(x * -0.70710678118654752440) +
      x * (0.39894228040143267794 * __builtin_exp(-0.5 * x * x));
}
