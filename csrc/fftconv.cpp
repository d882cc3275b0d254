// sssd_hpc_cpp::fftconv_*: the two-sided convolution on the processor in one pass over its rows.
//
// A group of features (see fftconv_kernels.h) is transformed, multiplied, transformed back and
// activated while it is in the cache. K, of shape (ceil(H / 16), N / 2 + 1, 4, 16) with 2N samples
// on the circle, holds groups of 16 float or 2 x 8 double features; features past H are zero. Every
// number comes from one thread in one order of sums, so that the threads' number changes no bit.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "fftconv.h"
#include "host.h"

#define SSSD_KERNELS "fftconv_kernels.h"
#include "dispatch.h"

namespace {

using at::Tensor;

// Whole groups of 16 features, whatever the dtype.
constexpr int64_t kFeatures = 16;

// The smallest N >= L with no prime factor above 5.
int64_t points(int64_t L) {
  for (int64_t N = L;; ++N) {
    int64_t rest = N;
    for (const int64_t prime : {2, 3, 5}) {
      while (rest % prime == 0) {
        rest /= prime;
      }
    }
    if (rest == 1) {
      return N;
    }
  }
}

// The radices of N, an even one first if there is one.
std::vector<int64_t> radices(int64_t N) {
  std::vector<int64_t> found;
  for (const int64_t radix : {8, 4, 2, 5, 3}) {
    while (N % radix == 0) {
      found.push_back(radix);
      N /= radix;
    }
  }
  return found;
}

// A plan with the memory that it points to.
template <class T>
struct PlanMemory : sssd::FftconvPlan<T> {
  std::vector<std::vector<T>> twiddles;
  std::vector<T> turns;
  std::vector<int32_t> points_, mirrors;
  std::vector<int64_t> begins;

  explicit PlanMemory(int64_t length) {
    this->L = length;
    this->N = points(length);
    const std::vector<int64_t> all = radices(this->N);
    this->stages = static_cast<int>(all.size());
    this->size[0] = this->N;
    for (int s = 0; s < this->stages; ++s) {
      this->radix[s] = all[s];
      this->size[s + 1] = this->size[s] / all[s];
      twiddles.emplace_back();
      for (int64_t j = 0; j < this->size[s + 1]; ++j) {
        for (int64_t q = 1; q < all[s]; ++q) {
          push_turn(twiddles.back(), j * q, this->size[s]);
        }
      }
    }
    for (int s = 0; s < this->stages; ++s) {
      this->twiddle[s] = twiddles[s].data();
    }
    this->blocks = this->stages ? this->radix[0] : 1;
    for (int64_t b = 0; b <= this->blocks / 2; ++b) {
      begins.push_back(static_cast<int64_t>(points_.size()));
      const int64_t M = this->N / this->blocks, other = (this->blocks - b) % this->blocks;
      for (int64_t i = b * M; i < (b + 1) * M; ++i) {
        const int64_t k = frequency(i), opposite = (this->N - k) % this->N;
        // Within a block that is its own mirror each pair is met twice.
        if (b != other || k <= opposite) {
          points_.push_back(static_cast<int32_t>(i));
          mirrors.push_back(static_cast<int32_t>(point_of(opposite)));
          push_turn(turns, k, this->N);
        }
      }
    }
    begins.push_back(static_cast<int64_t>(points_.size()));
    this->entries = begins.back();
    this->point = points_.data();
    this->mirror = mirrors.data();
    this->begin = begins.data();
    this->turn = turns.data();
  }

  PlanMemory(const PlanMemory&) = delete;

  static void push_turn(std::vector<T>& table, int64_t step, int64_t circle) {
    const double angle = 2 * M_PI * static_cast<double>(step % circle) / circle;
    table.push_back(static_cast<T>(std::cos(angle)));
    table.push_back(static_cast<T>(-std::sin(angle)));
  }

  // The transform leaves frequency q_0 + radix_0 (q_1 + radix_1 (..)) at point sum q_s size_s+1.
  int64_t frequency(int64_t point) const {
    int64_t k = 0, weight = 1;
    for (int s = 0; s < this->stages; ++s) {
      k += point / this->size[s + 1] * weight;
      point %= this->size[s + 1];
      weight *= this->radix[s];
    }
    return k;
  }

  int64_t point_of(int64_t k) const {
    int64_t point = 0;
    for (int s = 0; s < this->stages; ++s) {
      point += k % this->radix[s] * this->size[s + 1];
      k /= this->radix[s];
    }
    return point;
  }
};

// Kept, since a model asks for one length again and again; a few lengths, then forgotten.
template <class T>
std::shared_ptr<const sssd::FftconvPlan<T>> plan_of(int64_t L) {
  static std::mutex mutex;
  static std::map<int64_t, std::shared_ptr<const PlanMemory<T>>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  if (plans.size() > 16) {
    plans.clear();
  }
  auto& plan = plans[L];
  if (!plan) {
    plan = std::make_shared<const PlanMemory<T>>(L);
  }
  return plan;
}

// The features of one dtype's group, and their place in K.
template <class T>
struct Groups {
  static constexpr int64_t kWidth = sssd::kFftconvLanes<T>;
  int64_t H, count, stride;

  Groups(int64_t features, const sssd::FftconvPlan<T>& plan)
      : H(features),
        count((features + kFeatures - 1) / kFeatures * (kFeatures / kWidth)),
        stride(plan.entries * 4 * kWidth) {}

  // Features of group g: fewer than its width, or none, at the end.
  int64_t rows(int64_t g) const {
    return std::clamp<int64_t>(H - g * kWidth, 0, kWidth);
  }
};

std::vector<int64_t> spectrum_shape(int64_t H, int64_t L) {
  TORCH_CHECK(H > 0 && L > 0, "fftconv: H is ", H, " and L ", L, "; both must be positive");
  return {(H + kFeatures - 1) / kFeatures, points(L) / 2 + 1, 4, kFeatures};
}

void check_rows(const Tensor& u, const char* name) {
  sssd::check_real(u, name);
  TORCH_CHECK(
      u.dim() == 3 && u.numel() > 0, name, " has shape ", u.sizes(),
      "; expected (batch, H, L), not empty");
}

template <class T>
Tensor prepare_as(const Tensor& k, const Tensor& D) {
  const int64_t H = k.size(1), L = k.size(2);
  const auto plan = plan_of<T>(L);
  const Groups<T> groups(H, *plan);
  Tensor K = at::empty(spectrum_shape(H, L), k.options());
  const T *from = k.const_data_ptr<T>(), *skip = D.const_data_ptr<T>();
  T* to = K.mutable_data_ptr<T>();
  auto* kernel = SSSD_BEST(fftconv_prepare<T>);
  at::parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> z(plan->scratch());
    for (int64_t g = begin; g < end; ++g) {
      const int64_t h = g * groups.kWidth;
      if (groups.rows(g) == 0) {
        std::fill_n(to + g * groups.stride, groups.stride, T(0));
        continue;
      }
      kernel(
          *plan, from + h * L, from + (H + h) * L, skip + h, groups.rows(g),
          to + g * groups.stride, z.data());
    }
  });
  return K;
}

template <class T>
std::tuple<Tensor, Tensor> prepare_backward_as(const Tensor& dK, int64_t H, int64_t L) {
  const auto plan = plan_of<T>(L);
  const Groups<T> groups(H, *plan);
  Tensor dk = at::empty({2, H, L}, dK.options()), dD = at::empty({H}, dK.options());
  const T* from = dK.const_data_ptr<T>();
  T *to = dk.mutable_data_ptr<T>(), *skip = dD.mutable_data_ptr<T>();
  auto* kernel = SSSD_BEST(fftconv_prepare_backward<T>);
  at::parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> z(plan->scratch());
    for (int64_t g = begin; g < end && groups.rows(g) > 0; ++g) {
      const int64_t h = g * groups.kWidth;
      kernel(
          *plan, from + g * groups.stride, groups.rows(g), to + h * L, to + (H + h) * L, skip + h,
          z.data());
    }
  });
  return {dk, dD};
}

template <class T>
std::tuple<Tensor, Tensor> forward_as(const Tensor& u, const Tensor& K, bool gelu, bool keep) {
  const int64_t B = u.size(0), H = u.size(1), L = u.size(2);
  const auto plan = plan_of<T>(L);
  const Groups<T> groups(H, *plan);
  Tensor y = at::empty(u.sizes(), u.options());
  Tensor pre = keep ? at::empty(u.sizes(), u.options()) : at::empty({0}, u.options());
  const T *from = u.const_data_ptr<T>(), *spectrum = K.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  T* before = keep ? pre.mutable_data_ptr<T>() : nullptr;
  auto* kernel = SSSD_BEST(fftconv_forward<T>);
  // Batch entries of one group follow each other, so that its part of K stays in the cache.
  at::parallel_for(0, groups.count * B, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> z(plan->scratch());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / B, row = (i % B * H + g * groups.kWidth) * L;
      if (groups.rows(g) > 0) {
        kernel(
            *plan, from + row, groups.rows(g), spectrum + g * groups.stride, gelu, to + row,
            before ? before + row : nullptr, z.data());
      }
    }
  });
  return {y, pre};
}

template <class T>
std::tuple<Tensor, Tensor> backward_as(
    const Tensor& dy, const Tensor& u, const Tensor& K, const Tensor& pre, bool gelu) {
  const int64_t B = u.size(0), H = u.size(1), L = u.size(2);
  const auto plan = plan_of<T>(L);
  const Groups<T> groups(H, *plan);
  Tensor du = at::empty(u.sizes(), u.options()), dK = at::empty(K.sizes(), K.options());
  const T *gradient = dy.const_data_ptr<T>(), *from = u.const_data_ptr<T>();
  const T* spectrum = K.const_data_ptr<T>();
  const T* before = gelu ? pre.const_data_ptr<T>() : nullptr;
  T *to = du.mutable_data_ptr<T>(), *sum = dK.mutable_data_ptr<T>();
  auto* kernel = SSSD_BEST(fftconv_backward<T>);
  at::parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> z(plan->scratch()), g_scratch(plan->scratch());
    for (int64_t g = begin; g < end; ++g) {
      std::fill_n(sum + g * groups.stride, groups.stride, T(0));
      for (int64_t b = 0; b < B && groups.rows(g) > 0; ++b) {
        const int64_t row = (b * H + g * groups.kWidth) * L;
        kernel(
            *plan, gradient + row, from + row, before ? before + row : nullptr, groups.rows(g),
            spectrum + g * groups.stride, to + row, sum + g * groups.stride, z.data(),
            g_scratch.data());
      }
    }
  });
  return {du, dK};
}

Tensor prepare(const Tensor& k, const Tensor& D) {
  check_rows(k, "fftconv: k");
  sssd::check_like(k, "fftconv: k", {2, k.size(1), k.size(2)}, k);
  sssd::check_like(D, "fftconv: D", {k.size(1)}, k);
  return k.scalar_type() == at::kFloat ? prepare_as<float>(k, D) : prepare_as<double>(k, D);
}

std::tuple<Tensor, Tensor> prepare_backward(const Tensor& dK, int64_t H, int64_t L) {
  sssd::check_real(dK, "fftconv: dK");
  sssd::check_like(dK, "fftconv: dK", spectrum_shape(H, L), dK);
  return dK.scalar_type() == at::kFloat ? prepare_backward_as<float>(dK, H, L)
                                        : prepare_backward_as<double>(dK, H, L);
}

std::tuple<Tensor, Tensor> forward(const Tensor& u, const Tensor& K, bool gelu, bool keep) {
  check_rows(u, "fftconv: u");
  sssd::check_like(u, "fftconv: u", u.sizes(), u);
  sssd::check_like(K, "fftconv: K", spectrum_shape(u.size(1), u.size(2)), u);
  keep = keep && gelu;
  return u.scalar_type() == at::kFloat ? forward_as<float>(u, K, gelu, keep)
                                       : forward_as<double>(u, K, gelu, keep);
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& u, const Tensor& K, const Tensor& pre, bool gelu) {
  check_rows(u, "fftconv: u");
  sssd::check_like(u, "fftconv: u", u.sizes(), u);
  sssd::check_like(dy, "fftconv: dy", u.sizes(), u);
  sssd::check_like(K, "fftconv: K", spectrum_shape(u.size(1), u.size(2)), u);
  if (gelu) {
    sssd::check_like(pre, "fftconv: pre", u.sizes(), u);
  }
  return u.scalar_type() == at::kFloat ? backward_as<float>(dy, u, K, pre, gelu)
                                       : backward_as<double>(dy, u, K, pre, gelu);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sssd_hpc_cpp, m) {
  m.def("fftconv_prepare(Tensor k, Tensor D) -> Tensor");
  m.def("fftconv_prepare_backward(Tensor dK, int H, int L) -> (Tensor, Tensor)");
  m.def("fftconv_forward(Tensor u, Tensor K, bool gelu, bool keep) -> (Tensor, Tensor)");
  m.def(
      "fftconv_backward(Tensor dy, Tensor u, Tensor K, Tensor pre, bool gelu) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sssd_hpc_cpp, CPU, m) {
  m.impl("fftconv_prepare", &prepare);
  m.impl("fftconv_prepare_backward", &prepare_backward);
  m.impl("fftconv_forward", &forward);
  m.impl("fftconv_backward", &backward);
}
