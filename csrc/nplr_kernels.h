// The kernel's spectrum and its gradients for one feature; read once per level by dispatch.h.
//
// With w, B, P scaled by dt, v = X_i Y_j, a = 2 Re v, b = 2 Re(v conj w), t = 2 s and the node's
// cosine and sine c, s of theta/2, one reciprocal p + i q = 1/d serves every product of a state:
//
//     d = (c wr)^2 + (c wi - t)(c wi + t) - 2 i t c wr
//     R_ij = sum_n (-c b p - t a q) + i (t a p - c b q)
//     k_f = (c + i s)(R_BC - gamma R_PC),   gamma = c R_BQ / (1 + c R_PQ)
//
// All products share one reciprocal 1/d of each state, to the last bit: that keeps k_f accurate near
// the resonance c wi = t. A tile of nodes is worked on at a time: the reciprocals of all states
// first, which stay in the cache, then the sums, a few products at a time so that they stay in
// registers. Products are in the order BC for every channel, PC for every channel, BQ, PQ; the last
// two only where gamma is not given.
//
// S4 (arXiv:2111.00396), Algorithm 1; docs/math.md derives both directions.

// Vectors of nodes whose sums are in registers together, and states whose gradients are.
constexpr int64_t NODE_VECTORS = SSSD_BYTES == 64 ? 2 : 1;
constexpr int64_t STATE_BLOCK = SSSD_BYTES == 64 ? 4 : 2;

// Copies a and b of one feature to [state][product][a, b].
template <class T>
void nplr_pack(const sssd::NplrProblem<T>& problem, int64_t h, T* __restrict ab) {
  const int64_t channels = problem.channels, N2 = problem.N2, products = problem.products();
  const int64_t J = products / 2, plane = problem.H * N2;
  for (int64_t i = 0; i < 2; ++i) {
    for (int64_t j = 0; j < J; ++j) {
      const int64_t product = j < channels ? i * channels + j : 2 * channels + i;
      const T* a = problem.a + (i * J + j) * plane + h * N2;
      const T* b = problem.b + (i * J + j) * plane + h * N2;
      for (int64_t n = 0; n < N2; ++n) {
        ab[2 * (n * products + product)] = a[n];
        ab[2 * (n * products + product) + 1] = b[n];
      }
    }
  }
}

// Copies a tile of c and t = 2 s; repeats the last node, so that what is past the end is finite.
template <class T>
void nplr_nodes(
    const sssd::NplrProblem<T>& problem, int64_t l0, int64_t count, T* __restrict c,
    T* __restrict t) {
  for (int64_t i = 0; i < count; ++i) {
    c[i] = problem.c[l0 + i];
    t[i] = 2 * problem.s[l0 + i];
  }
  for (int64_t i = count; i < sssd::kNplrTile<T>; ++i) {
    c[i] = c[count - 1];
    t[i] = t[count - 1];
  }
}

// 1/x. The division of wide vectors is slow next to their FMA: an estimate of 14 bits and Newton's
// steps give the same but for the last bit.
#if SSSD_BYTES == 64
SSSD_INLINE Lanes<float> nplr_inverse(Lanes<float> x) {
  const Lanes<float> y = __builtin_ia32_rcp14ps512_mask(x, x, -1);
  return y + y * (1.0f - x * y);
}

SSSD_INLINE Lanes<double> nplr_inverse(Lanes<double> x) {
  Lanes<double> y = __builtin_ia32_rcp14pd512_mask(x, x, -1);
  y += y * (1.0 - x * y);
  return y + y * (1.0 - x * y);
}
#else
template <class V>
SSSD_INLINE V nplr_inverse(V x) {
  return 1 / x;
}
#endif

// p + i q = 1/d of every state, each a row of a tile.
template <class T>
void nplr_reciprocals(
    const T* wr, const T* wi, int64_t N2, int64_t vectors, const T* c_, const T* t_,
    T* __restrict p_, T* __restrict q_) {
  typedef Lanes<T> V;
  for (int64_t n = 0; n < N2; ++n) {
    const V wr_n = fill(wr[n]), wi_n = fill(wi[n]);
    for (int64_t v = 0; v < vectors; ++v) {
      const V c = load(c_ + v * LANES<T>), t = load(t_ + v * LANES<T>);
      const V cw = c * wr_n;
      const V dr = cw * cw + (c * wi_n - t) * (c * wi_n + t);
      const V minus_di = (t + t) * cw;
      const V inverse = nplr_inverse(V(dr * dr + minus_di * minus_di));
      store(p_ + n * sssd::kNplrTile<T> + v * LANES<T>, V(dr * inverse));
      store(q_ + n * sssd::kNplrTile<T> + v * LANES<T>, V(minus_di * inverse));
    }
  }
}

// R of PRODUCTS products at VECTORS vectors of nodes, into planes of a tile: Re R, Im R.
template <class T, int PRODUCTS, int VECTORS>
SSSD_INLINE void nplr_sums_block(
    const T* ab, int64_t stride, int64_t N2, const T* p_, const T* q_, const T* c_, const T* t_,
    T* __restrict R) {
  typedef Lanes<T> V;
  V ap[PRODUCTS][VECTORS] = {}, aq[PRODUCTS][VECTORS] = {};
  V bp[PRODUCTS][VECTORS] = {}, bq[PRODUCTS][VECTORS] = {};
  for (int64_t n = 0; n < N2; ++n) {
    V p[VECTORS], q[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      p[v] = load(p_ + n * sssd::kNplrTile<T> + v * LANES<T>);
      q[v] = load(q_ + n * sssd::kNplrTile<T> + v * LANES<T>);
    }
    for (int j = 0; j < PRODUCTS; ++j) {
      const V a = fill(ab[n * stride + 2 * j]), b = fill(ab[n * stride + 2 * j + 1]);
      for (int v = 0; v < VECTORS; ++v) {
        ap[j][v] += a * p[v];
        aq[j][v] += a * q[v];
        bp[j][v] += b * p[v];
        bq[j][v] += b * q[v];
      }
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    const V c = load(c_ + v * LANES<T>), t = load(t_ + v * LANES<T>);
    for (int j = 0; j < PRODUCTS; ++j) {
      T* out = R + 2 * j * sssd::kNplrTile<T> + v * LANES<T>;
      store(out, V(-c * bp[j][v] - t * aq[j][v]));
      store(out + sssd::kNplrTile<T>, V(t * ap[j][v] - c * bq[j][v]));
    }
  }
}

template <class T, int PRODUCTS>
void nplr_sums_of(
    const T* ab, int64_t stride, int64_t N2, int64_t vectors, const T* p, const T* q, const T* c,
    const T* t, T* __restrict R) {
  int64_t v = 0;
  for (; v + NODE_VECTORS <= vectors; v += NODE_VECTORS) {
    const int64_t l = v * LANES<T>;
    nplr_sums_block<T, PRODUCTS, NODE_VECTORS>(ab, stride, N2, p + l, q + l, c + l, t + l, R + l);
  }
  for (; v < vectors; ++v) {
    const int64_t l = v * LANES<T>;
    nplr_sums_block<T, PRODUCTS, 1>(ab, stride, N2, p + l, q + l, c + l, t + l, R + l);
  }
}

// R of the products first..last-1, three at a time or fewer, as evenly as that goes.
template <class T>
void nplr_sums(
    const T* ab, int64_t products, int64_t first, int64_t last, int64_t N2, int64_t vectors,
    const T* p, const T* q, const T* c, const T* t, T* R) {
  while (first < last) {
    const int64_t left = last - first, blocks = (left + 2) / 3, now = (left + blocks - 1) / blocks;
    const T* ab_now = ab + 2 * first;
    T* R_now = R + 2 * first * sssd::kNplrTile<T>;
    if (now == 3) {
      nplr_sums_of<T, 3>(ab_now, 2 * products, N2, vectors, p, q, c, t, R_now);
    } else if (now == 2) {
      nplr_sums_of<T, 2>(ab_now, 2 * products, N2, vectors, p, q, c, t, R_now);
    } else {
      nplr_sums_of<T, 1>(ab_now, 2 * products, N2, vectors, p, q, c, t, R_now);
    }
    first += now;
  }
}

// Planes of a tile from interleaved pairs; zero past the end.
template <class T>
void nplr_split(const T* pairs, int64_t count, T* __restrict real, T* __restrict imag) {
  for (int64_t i = 0; i < count; ++i) {
    real[i] = pairs[2 * i];
    imag[i] = pairs[2 * i + 1];
  }
  for (int64_t i = count; i < sssd::kNplrTile<T>; ++i) {
    real[i] = imag[i] = 0;
  }
}

// gamma of a tile: given, or from R_BQ and R_PQ. Also u = 1 / (1 + c R_PQ) where `u` is not null.
template <class T>
void nplr_gamma(
    const sssd::NplrProblem<T>& problem, int64_t h, int64_t l0, int64_t count, int64_t vectors,
    const T* c_, const T* R, T* __restrict gamma, T* __restrict u) {
  typedef Lanes<T> V;
  constexpr int64_t TILE = sssd::kNplrTile<T>;
  if (problem.gamma) {
    nplr_split(problem.gamma + 2 * (h * problem.F + l0), count, gamma, gamma + TILE);
    return;
  }
  const T* BQ = R + 4 * problem.channels * TILE;
  const T* PQ = BQ + 2 * TILE;
  for (int64_t l = 0; l < vectors * LANES<T>; l += LANES<T>) {
    const V c = load(c_ + l);
    const V er = T(1) + c * load(PQ + l), ei = c * load(PQ + TILE + l);
    const V inverse = T(1) / (er * er + ei * ei);
    const V ur = er * inverse, ui = -ei * inverse;
    const V br = c * load(BQ + l), bi = c * load(BQ + TILE + l);
    store(gamma + l, V(br * ur - bi * ui));
    store(gamma + TILE + l, V(br * ui + bi * ur));
    if (u) {
      store(u + l, ur);
      store(u + TILE + l, ui);
    }
  }
}

// k_f (channels, H, F, 2) of feature h at the nodes begin..end-1.
template <class T>
void nplr_forward_feature(
    const sssd::NplrProblem<T>& problem, int64_t h, int64_t begin, int64_t end, T* scratch,
    T* __restrict k_f) {
  typedef Lanes<T> V;
  constexpr int64_t TILE = sssd::kNplrTile<T>;
  const int64_t channels = problem.channels, N2 = problem.N2, products = problem.products();
  T* c = scratch;
  T* t = c + TILE;
  T* p = t + TILE;
  T* q = p + N2 * TILE;
  T* R = q + N2 * TILE;
  T* gamma = R + 2 * products * TILE;
  T* ab = gamma + 4 * TILE;
  nplr_pack(problem, h, ab);
  for (int64_t l0 = begin; l0 < end; l0 += TILE) {
    const int64_t count = end - l0 < TILE ? end - l0 : TILE;
    const int64_t vectors = (count + LANES<T> - 1) / LANES<T>;
    nplr_nodes(problem, l0, count, c, t);
    nplr_reciprocals(problem.wr + h * N2, problem.wi + h * N2, N2, vectors, c, t, p, q);
    nplr_sums(ab, products, 0, products, N2, vectors, p, q, c, t, R);
    nplr_gamma<T>(problem, h, l0, count, vectors, c, R, gamma, nullptr);
    for (int64_t ch = 0; ch < channels; ++ch) {
      T* BC = R + 2 * ch * TILE;
      const T* PC = R + 2 * (channels + ch) * TILE;
      for (int64_t l = 0; l < vectors * LANES<T>; l += LANES<T>) {
        const V gr = load(gamma + l), gi = load(gamma + TILE + l);
        const V pr = load(PC + l), pi = load(PC + TILE + l);
        const V kr = load(BC + l) - (gr * pr - gi * pi);
        const V ki = load(BC + TILE + l) - (gr * pi + gi * pr);
        const V cos = load(c + l), sin = T(0.5) * load(t + l);
        store(BC + l, V(cos * kr - sin * ki));
        store(BC + TILE + l, V(cos * ki + sin * kr));
      }
      T* out = k_f + 2 * ((ch * problem.H + h) * problem.F + l0);
      for (int64_t i = 0; i < count; ++i) {
        out[2 * i] = BC[i];
        out[2 * i + 1] = BC[TILE + i];
      }
    }
  }
}

// Planes t Im G, -t Re G, -c Re G, -c Im G of one product from its gradient G at VECTORS nodes.
template <class T>
SSSD_INLINE void nplr_weigh(Lanes<T> c, Lanes<T> t, Lanes<T> Gr, Lanes<T> Gi, T* __restrict out) {
  constexpr int64_t TILE = sssd::kNplrTile<T>;
  store(out, Lanes<T>(t * Gi));
  store(out + TILE, Lanes<T>(-t * Gr));
  store(out + 2 * TILE, Lanes<T>(-c * Gr));
  store(out + 3 * TILE, Lanes<T>(-c * Gi));
}

// The gradients G of all products of a tile from g, weighed as `nplr_weigh` does.
template <class T>
void nplr_product_gradients(
    const sssd::NplrProblem<T>& problem, const T* g, int64_t h, int64_t l0, int64_t count,
    int64_t vectors, const T* c_, const T* t_, const T* R, const T* gamma, const T* u,
    T* __restrict g_tile, T* __restrict G) {
  typedef Lanes<T> V;
  constexpr int64_t TILE = sssd::kNplrTile<T>;
  const int64_t channels = problem.channels;
  // The gradient of gamma: minus the sum over the channels of conj(R_PC) G.
  T* Ggamma = g_tile + 2 * TILE;
  for (int64_t i = 0; i < 2 * TILE; ++i) {
    Ggamma[i] = 0;
  }
  for (int64_t ch = 0; ch < channels; ++ch) {
    nplr_split(
        g + 2 * ((ch * problem.H + h) * problem.F + l0), count, g_tile, g_tile + TILE);
    const T* PC = R + 2 * (channels + ch) * TILE;
    for (int64_t l = 0; l < vectors * LANES<T>; l += LANES<T>) {
      const V c = load(c_ + l), t = load(t_ + l), s = T(0.5) * t;
      const V gr = load(g_tile + l), gi = load(g_tile + TILE + l);
      const V Gr = c * gr + s * gi, Gi = c * gi - s * gr;
      const V yr = load(gamma + l), yi = load(gamma + TILE + l);
      nplr_weigh<T>(c, t, Gr, Gi, G + 4 * ch * TILE + l);
      nplr_weigh<T>(
          c, t, -(yr * Gr + yi * Gi), yi * Gr - yr * Gi, G + 4 * (channels + ch) * TILE + l);
      if (!problem.gamma) {
        const V rr = load(PC + l), ri = load(PC + TILE + l);
        store(Ggamma + l, V(load(Ggamma + l) - (rr * Gr + ri * Gi)));
        store(Ggamma + TILE + l, V(load(Ggamma + TILE + l) - (rr * Gi - ri * Gr)));
      }
    }
  }
  if (problem.gamma) {
    return;
  }
  for (int64_t l = 0; l < vectors * LANES<T>; l += LANES<T>) {
    const V c = load(c_ + l), t = load(t_ + l);
    const V ur = load(u + l), ui = load(u + TILE + l);
    const V yr = load(gamma + l), yi = load(gamma + TILE + l);
    const V gr = load(Ggamma + l), gi = load(Ggamma + TILE + l);
    const V Br = c * (ur * gr + ui * gi), Bi = c * (ur * gi - ui * gr);
    nplr_weigh<T>(c, t, Br, Bi, G + 8 * channels * TILE + l);
    nplr_weigh<T>(
        c, t, -(yr * Br + yi * Bi), yi * Br - yr * Bi, G + (8 * channels + 4) * TILE + l);
  }
}

// Adds a tile's da and db of STATES states, of all products, to sums kept as vectors.
template <class T, int STATES>
void nplr_product_sums(
    int64_t products, int64_t vectors, const T* p_, const T* q_, const T* G, T* __restrict sums) {
  typedef Lanes<T> V;
  constexpr int64_t TILE = sssd::kNplrTile<T>;
  // The number of products is even.
  for (int64_t j = 0; j < products; j += 2) {
    V da[STATES][2] = {}, db[STATES][2] = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t l = v * LANES<T>;
      V p[STATES], q[STATES];
      for (int n = 0; n < STATES; ++n) {
        p[n] = load(p_ + n * TILE + l);
        q[n] = load(q_ + n * TILE + l);
      }
      for (int k = 0; k < 2; ++k) {
        const T* G_j = G + 4 * (j + k) * TILE + l;
        const V ap = load(G_j), aq = load(G_j + TILE);
        const V bp = load(G_j + 2 * TILE), bq = load(G_j + 3 * TILE);
        for (int n = 0; n < STATES; ++n) {
          da[n][k] += ap * p[n];
          db[n][k] += bp * p[n];
          da[n][k] += aq * q[n];
          db[n][k] += bq * q[n];
        }
      }
    }
    for (int n = 0; n < STATES; ++n) {
      for (int k = 0; k < 2; ++k) {
        T* out = sums + 2 * (n * products + j + k) * LANES<T>;
        store(out, V(load(out) + da[n][k]));
        store(out + LANES<T>, V(load(out + LANES<T>) + db[n][k]));
      }
    }
  }
}

// Adds a tile's sum c^2 Re dd and sum s c Im dd of STATES states, dd the gradient of conj(d).
template <class T, int STATES>
void nplr_pole_sums(
    const T* ab, int64_t products, int64_t vectors, const T* p_, const T* q_, const T* c_,
    const T* t_, const T* G, T* __restrict sums) {
  typedef Lanes<T> V;
  constexpr int64_t TILE = sssd::kNplrTile<T>;
  V first[STATES] = {}, second[STATES] = {};
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t l = v * LANES<T>;
    V xr[STATES] = {}, xi[STATES] = {};
    for (int64_t j = 0; j < products; ++j) {
      const T* G_j = G + 4 * j * TILE + l;
      const V ap = load(G_j), aq = load(G_j + TILE);
      const V bp = load(G_j + 2 * TILE), bq = load(G_j + 3 * TILE);
      for (int n = 0; n < STATES; ++n) {
        const V a = fill(ab[2 * (n * products + j)]), b = fill(ab[2 * (n * products + j) + 1]);
        xr[n] += a * ap;
        xi[n] += a * aq;
        xr[n] += b * bp;
        xi[n] += b * bq;
      }
    }
    const V c = load(c_ + l), cs = T(0.5) * c * load(t_ + l), cc = c * c;
    for (int n = 0; n < STATES; ++n) {
      const V p = load(p_ + n * TILE + l), q = load(q_ + n * TILE + l);
      const V squared_r = p * p - q * q, squared_i = T(2) * p * q;
      first[n] -= cc * (squared_r * xr[n] + squared_i * xi[n]);
      second[n] -= cs * (squared_r * xi[n] - squared_i * xr[n]);
    }
  }
  for (int n = 0; n < STATES; ++n) {
    T* out = sums + 2 * n * LANES<T>;
    store(out, V(load(out) + first[n]));
    store(out + LANES<T>, V(load(out + LANES<T>) + second[n]));
  }
}

template <class T>
T nplr_total(const T* vector) {
  T total = 0;
  for (int64_t i = 0; i < LANES<T>; ++i) {
    total += vector[i];
  }
  return total;
}

// da, db (2, J, H, N2) and, where gamma is not given, dwr, dwi (H, N2) of feature h.
template <class T>
void nplr_backward_feature(
    const sssd::NplrProblem<T>& problem, const T* g, int64_t h, T* scratch, T* __restrict da,
    T* __restrict db, T* __restrict dwr, T* __restrict dwi) {
  constexpr int64_t TILE = sssd::kNplrTile<T>;
  const int64_t channels = problem.channels, N2 = problem.N2, F = problem.F;
  const int64_t products = problem.products();
  const T* wr = problem.wr + h * N2;
  const T* wi = problem.wi + h * N2;
  T* c = scratch;
  T* t = c + TILE;
  T* p = t + TILE;
  T* q = p + N2 * TILE;
  T* R = q + N2 * TILE;
  T* gamma = R + 2 * products * TILE;
  T* u = gamma + 2 * TILE;
  T* g_tile = u + 2 * TILE;
  T* G = g_tile + 4 * TILE;
  T* sums = G + 4 * products * TILE;
  T* pole_sums = sums + 2 * products * N2 * LANES<T>;
  T* ab = pole_sums + 2 * N2 * LANES<T>;
  nplr_pack(problem, h, ab);
  for (int64_t i = 0; i < 2 * (products + 1) * N2 * LANES<T>; ++i) {
    sums[i] = 0;
  }
  for (int64_t l0 = 0; l0 < F; l0 += TILE) {
    const int64_t count = F - l0 < TILE ? F - l0 : TILE;
    const int64_t vectors = (count + LANES<T> - 1) / LANES<T>;
    nplr_nodes(problem, l0, count, c, t);
    nplr_reciprocals(wr, wi, N2, vectors, c, t, p, q);
    if (!problem.gamma) {
      nplr_sums(ab, products, channels, products, N2, vectors, p, q, c, t, R);
    }
    nplr_gamma(problem, h, l0, count, vectors, c, R, gamma, u);
    nplr_product_gradients(
        problem, g, h, l0, count, vectors, c, t, R, gamma, u, g_tile, G);
    int64_t n = 0;
    for (; n + STATE_BLOCK <= N2; n += STATE_BLOCK) {
      nplr_product_sums<T, STATE_BLOCK>(
          products, vectors, p + n * TILE, q + n * TILE, G, sums + 2 * n * products * LANES<T>);
    }
    for (; n < N2; ++n) {
      nplr_product_sums<T, 1>(
          products, vectors, p + n * TILE, q + n * TILE, G, sums + 2 * n * products * LANES<T>);
    }
    if (problem.gamma) {
      continue;
    }
    for (n = 0; n + 4 <= N2; n += 4) {
      nplr_pole_sums<T, 4>(
          ab + 2 * n * products, products, vectors, p + n * TILE, q + n * TILE, c, t, G,
          pole_sums + 2 * n * LANES<T>);
    }
    for (; n < N2; ++n) {
      nplr_pole_sums<T, 1>(
          ab + 2 * n * products, products, vectors, p + n * TILE, q + n * TILE, c, t, G,
          pole_sums + 2 * n * LANES<T>);
    }
  }
  const int64_t J = products / 2, plane = problem.H * N2;
  for (int64_t i = 0; i < 2; ++i) {
    for (int64_t j = 0; j < J; ++j) {
      const int64_t product = j < channels ? i * channels + j : 2 * channels + i;
      for (int64_t n = 0; n < N2; ++n) {
        const T* sum = sums + 2 * (n * products + product) * LANES<T>;
        da[(i * J + j) * plane + h * N2 + n] = nplr_total(sum);
        db[(i * J + j) * plane + h * N2 + n] = nplr_total(sum + LANES<T>);
      }
    }
  }
  if (problem.gamma) {
    return;
  }
  for (int64_t n = 0; n < N2; ++n) {
    const T first = nplr_total(pole_sums + 2 * n * LANES<T>);
    const T second = nplr_total(pole_sums + (2 * n + 1) * LANES<T>);
    dwr[h * N2 + n] = 2 * wr[n] * first - 4 * second;
    dwi[h * N2 + n] = 2 * wi[n] * first;
  }
}
