// The Cauchy sum over poles in conjugate pairs; read once per level by dispatch.h.
//
//     r(z) = sum_n v_n up_n + conj(v_n) down_n,   up = 1/(z - w),   down = 1/(z - conj w)
//
// The two quotients of a pair are not merged, and gradients square the reciprocal and not the
// difference: either would overflow float32 near omega = -1, where |z| reaches 1e16.

// Planes of a tile from interleaved pairs, from the last one on repeated or, for a gradient, zero.
template <class T>
void cauchy_split(
    const T* pairs, int64_t count, bool repeat, T* __restrict real, T* __restrict imag) {
  for (int64_t i = 0; i < count; ++i) {
    real[i] = pairs[2 * i];
    imag[i] = pairs[2 * i + 1];
  }
  for (int64_t i = count; i < sssd::kCauchyTile; ++i) {
    real[i] = repeat ? real[count - 1] : T(0);
    imag[i] = repeat ? imag[count - 1] : T(0);
  }
}

template <class T>
void cauchy_merge(const T* real, const T* imag, int64_t count, T* __restrict pairs) {
  for (int64_t i = 0; i < count; ++i) {
    pairs[2 * i] = real[i];
    pairs[2 * i + 1] = imag[i];
  }
}

template <class T>
struct CauchyQuotients {
  Lanes<T> up_r, up_i, down_r, down_i;
};

template <class T>
SSSD_INLINE CauchyQuotients<T> cauchy_quotients(Lanes<T> zr, Lanes<T> zi, T wr, T wi) {
  typedef Lanes<T> V;
  const V er = zr - wr, up = zi - wi, down = zi + wi;
  const V rr = er * er;
  const V up_inverse = 1 / (rr + up * up), down_inverse = 1 / (rr + down * down);
  return {er * up_inverse, -up * up_inverse, er * down_inverse, -down * down_inverse};
}

// r (L, 2) of one row at the nodes begin..end-1; v, w (N2, 2), z (L, 2).
template <class T>
void cauchy_forward_row(
    const T* v, const T* z, const T* w, int64_t N2, int64_t begin, int64_t end, T* scratch,
    T* __restrict r) {
  typedef Lanes<T> V;
  constexpr int64_t TILE = sssd::kCauchyTile;
  T* zr = scratch;
  T* zi = zr + TILE;
  T* rr = zi + TILE;
  T* ri = rr + TILE;
  for (int64_t l0 = begin; l0 < end; l0 += TILE) {
    const int64_t count = end - l0 < TILE ? end - l0 : TILE;
    cauchy_split(z + 2 * l0, count, true, zr, zi);
    for (int64_t l = 0; l < count; l += LANES<T>) {
      const V zr_l = load(zr + l), zi_l = load(zi + l);
      V sum_r = {}, sum_i = {};
      for (int64_t n = 0; n < N2; ++n) {
        const T vr = v[2 * n], vi = v[2 * n + 1];
        const auto x = cauchy_quotients<T>(zr_l, zi_l, w[2 * n], w[2 * n + 1]);
        sum_r += vr * (x.up_r + x.down_r) - vi * (x.up_i - x.down_i);
        sum_i += vr * (x.up_i + x.down_i) + vi * (x.up_r - x.down_r);
      }
      store(rr + l, sum_r);
      store(ri + l, sum_i);
    }
    cauchy_merge(rr, ri, count, r + 2 * l0);
  }
}

template <class T>
T cauchy_total(const T* vector) {
  T total = 0;
  for (int64_t i = 0; i < LANES<T>; ++i) {
    total += vector[i];
  }
  return total;
}

// dv, dw (N2, 2) and, unless it is null, dz (L, 2) of one row from g (L, 2).
template <class T>
void cauchy_backward_row(
    const T* g, const T* v, const T* z, const T* w, int64_t N2, int64_t L, T* scratch,
    T* __restrict dv, T* __restrict dz, T* __restrict dw) {
  typedef Lanes<T> V;
  constexpr int64_t TILE = sssd::kCauchyTile;
  T* zr = scratch;
  T* zi = zr + TILE;
  T* gr = zi + TILE;
  T* gi = gr + TILE;
  T* slope_r = gi + TILE;
  T* slope_i = slope_r + TILE;
  // Vectors of partial sums: dv and, before the factor conj v, dw of each state.
  T* sums = slope_i + TILE;
  for (int64_t i = 0; i < 4 * N2 * LANES<T>; ++i) {
    sums[i] = 0;
  }
  for (int64_t l0 = 0; l0 < L; l0 += TILE) {
    const int64_t count = L - l0 < TILE ? L - l0 : TILE;
    cauchy_split(z + 2 * l0, count, true, zr, zi);
    cauchy_split(g + 2 * l0, count, false, gr, gi);
    for (int64_t i = 0; i < TILE; ++i) {
      slope_r[i] = slope_i[i] = 0;
    }
    for (int64_t n = 0; n < N2; ++n) {
      const T vr = v[2 * n], vi = v[2 * n + 1];
      V dv_r = {}, dv_i = {}, dw_r = {}, dw_i = {};
      for (int64_t l = 0; l < count; l += LANES<T>) {
        const V G_r = load(gr + l), G_i = load(gi + l);
        const auto x = cauchy_quotients<T>(load(zr + l), load(zi + l), w[2 * n], w[2 * n + 1]);
        dv_r += G_r * (x.up_r + x.down_r) + G_i * (x.up_i + x.down_i);
        dv_i += G_i * (x.up_r - x.down_r) - G_r * (x.up_i - x.down_i);
        const V up_r = x.up_r * x.up_r - x.up_i * x.up_i, up_i = 2 * x.up_r * x.up_i;
        const V down_r = x.down_r * x.down_r - x.down_i * x.down_i;
        const V down_i = 2 * x.down_r * x.down_i;
        dw_r += G_r * (up_r + down_r) + G_i * (up_i + down_i);
        dw_i += G_i * (up_r - down_r) - G_r * (up_i - down_i);
        if (dz) {
          store(slope_r + l, V(load(slope_r + l) + vr * (up_r + down_r) - vi * (up_i - down_i)));
          store(slope_i + l, V(load(slope_i + l) + vr * (up_i + down_i) + vi * (up_r - down_r)));
        }
      }
      const V totals[] = {dv_r, dv_i, dw_r, dw_i};
      for (int64_t k = 0; k < 4; ++k) {
        T* out = sums + (4 * n + k) * LANES<T>;
        store(out, V(load(out) + totals[k]));
      }
    }
    if (dz) {
      for (int64_t l = 0; l < count; l += LANES<T>) {
        const V G_r = load(gr + l), G_i = load(gi + l);
        const V s_r = load(slope_r + l), s_i = load(slope_i + l);
        store(slope_r + l, V(-(G_r * s_r + G_i * s_i)));
        store(slope_i + l, V(G_r * s_i - G_i * s_r));
      }
      cauchy_merge(slope_r, slope_i, count, dz + 2 * l0);
    }
  }
  for (int64_t n = 0; n < N2; ++n) {
    const T* sum = sums + 4 * n * LANES<T>;
    const T vr = v[2 * n], vi = v[2 * n + 1];
    const T x = cauchy_total(sum + 2 * LANES<T>), y = cauchy_total(sum + 3 * LANES<T>);
    dv[2 * n] = cauchy_total(sum);
    dv[2 * n + 1] = cauchy_total(sum + LANES<T>);
    dw[2 * n] = vr * x + vi * y;
    dw[2 * n + 1] = vr * y - vi * x;
  }
}

// Adds up rows of `size` values at begin..end-1, in the order of the rows.
template <class T>
void cauchy_add_rows(
    const T* rows, int64_t count, int64_t size, int64_t begin, int64_t end, T* __restrict total) {
  for (int64_t i = begin; i < end; ++i) {
    total[i] = 0;
  }
  for (int64_t row = 0; row < count; ++row) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      total[i] += rows[row * size + i];
    }
  }
}
