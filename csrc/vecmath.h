// exp and the normal distribution for every level; for use in a kernels file of dispatch.h:
// include it there, inside the level's namespace (no guard, nothing of the standard library).
//
//     exponential(x)              e^x
//     normal(x, &cdf, &pdf)       Phi(x) and phi(x) of the standard normal distribution; then
//                                 gelu(x) = x Phi(x) and gelu'(x) = Phi(x) + x phi(x)
//
// of a float, a double, a Lanes<float> or a Lanes<double>. No branches for float, so that loops
// over scalars vectorise as well; doubles go through the C library, one by one. NaN and infinities
// are as in C. Largest errors in float: exponential 1 unit of the last place, subnormal results
// included; cdf 1.5e-7 (two units of 1/2) and, for x < 0, 6e-6 of itself; pdf 5e-8. Both tails are
// exactly 0 past |x| = 12.6, where the truth is below 1e-35.

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

// Phi(-a) = e^{-a^2/2} t P(u) with a = |x|, t = 1 / (1 + 0.4 a) and u = 1 - t = 0.4 a t. P is
// fitted for the least error of Phi (2e-8), in u because the rounding of t would spoil it near 0.
template <class I, class V>
SSSD_INLINE void normal_of(V x, V* cdf, V* pdf) {
  V a = x < V{} ? -x : x;
  // An infinite x would make a NaN below; a NaN passes.
  a = a > V{} + 30.0f ? V{} + 30.0f : a;
  const V e = -0.5f * a * a;
  const V bell = e < V{} - 80.0f ? V{} : exponential_of<I>(e);
  const V t = 1.0f / (a * 0.4f + 1.0f);
  const V u = a * t * 0.4f;
  V p = u * 3.56284529e-2f - 6.75430223e-2f;
  p = p * u - 6.39079884e-3f;
  p = p * u + 8.99923965e-3f;
  p = p * u + 1.18588552e-1f;
  p = p * u + 6.77212775e-2f;
  p = p * u - 4.97354150e-1f;
  p = p * u + 0.5f;
  const V tail = bell * (p * t);
  *cdf = x < V{} ? tail : 1.0f - tail;
  *pdf = bell * 0.398942280f;
}

SSSD_INLINE float exponential(float x) {
  return exponential_of<int32_t>(x);
}

SSSD_INLINE double exponential(double x) {
  return __builtin_exp(x);
}

SSSD_INLINE void normal(float x, float* cdf, float* pdf) {
  normal_of<int32_t>(x, cdf, pdf);
}

SSSD_INLINE void normal(double x, double* cdf, double* pdf) {
  *cdf = 0.5 * __builtin_erfc(x * -0.70710678118654752440);
  *pdf = 0.39894228040143267794 * __builtin_exp(-0.5 * x * x);
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

SSSD_INLINE void normal(Lanes<float> x, Lanes<float>* cdf, Lanes<float>* pdf) {
  normal_of<Lanes<int32_t>>(x, cdf, pdf);
}

SSSD_INLINE void normal(Lanes<double> x, Lanes<double>* cdf, Lanes<double>* pdf) {
  for (int64_t i = 0; i < LANES<double>; ++i) {
    double c, d;
    normal(x[i], &c, &d);
    (*cdf)[i] = c;
    (*pdf)[i] = d;
  }
}
