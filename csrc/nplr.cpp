// sssd_hpc_cpp::nplr_forward and nplr_backward: the S4 kernel's spectrum on the processor.
//
// Features are independent and each is worked on by one thread, so that results do not depend on
// the number of threads. Shapes are those of sssd_hpc/ops/nplr.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "host.h"
#include "nplr.h"

#define SSSD_KERNELS "nplr_kernels.h"
#include "dispatch.h"

namespace {

using at::Tensor;

int64_t check_all(
    const Tensor& a, const Tensor& b, const Tensor& wr, const Tensor& wi, const Tensor& c,
    const Tensor& s, const std::optional<Tensor>& gamma) {
  sssd::check_real(a, "nplr: a");
  TORCH_CHECK(
      a.dim() == 4 && a.size(0) == 2 && a.numel() > 0 && c.dim() == 1 && c.numel() > 0,
      "nplr: a has shape ", a.sizes(), " and c ", c.sizes(),
      "; expected (2, J, H, N2) and (F,), not empty");
  const int64_t J = a.size(1), H = a.size(2), N2 = a.size(3), F = c.size(0);
  const int64_t channels = gamma ? J : J - 1;
  TORCH_CHECK(channels > 0, "nplr: a has shape ", a.sizes(), "; without gamma J must be above 1");
  sssd::check_like(a, "nplr: a", a.sizes(), a);
  sssd::check_like(b, "nplr: b", a.sizes(), a);
  sssd::check_like(wr, "nplr: wr", {H, N2}, a);
  sssd::check_like(wi, "nplr: wi", {H, N2}, a);
  sssd::check_like(c, "nplr: c", {F}, a);
  sssd::check_like(s, "nplr: s", {F}, a);
  if (gamma) {
    sssd::check_like(*gamma, "nplr: gamma", {H, F, 2}, a);
  }
  return channels;
}

template <class T>
sssd::NplrProblem<T> problem_of(
    const Tensor& a, const Tensor& b, const Tensor& wr, const Tensor& wi, const Tensor& c,
    const Tensor& s, const std::optional<Tensor>& gamma, int64_t channels) {
  return {
      a.const_data_ptr<T>(),
      b.const_data_ptr<T>(),
      wr.const_data_ptr<T>(),
      wi.const_data_ptr<T>(),
      c.const_data_ptr<T>(),
      s.const_data_ptr<T>(),
      gamma ? gamma->const_data_ptr<T>() : nullptr,
      channels,
      a.size(2),
      a.size(3),
      c.size(0)};
}

template <class T>
void forward(const sssd::NplrProblem<T>& problem, T* k_f) {
  auto* feature = SSSD_BEST(nplr_forward_feature<T>);
  // A piece is one tile of a feature where there are few features, else all of them.
  const int64_t tile = sssd::kNplrTile<T>;
  const int64_t tiles = (problem.F + tile - 1) / tile;
  const int64_t per_piece = problem.H >= 4 * at::get_num_threads() ? tiles : 1;
  const int64_t pieces = (tiles + per_piece - 1) / per_piece;
  at::parallel_for(0, problem.H * pieces, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> scratch(problem.forward_scratch());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t l0 = i % pieces * per_piece * tile;
      const int64_t l1 = std::min(problem.F, l0 + per_piece * tile);
      feature(problem, i / pieces, l0, l1, scratch.data(), k_f);
    }
  });
}

template <class T>
void backward(const sssd::NplrProblem<T>& problem, const T* g, T* da, T* db, T* dwr, T* dwi) {
  auto* feature = SSSD_BEST(nplr_backward_feature<T>);
  at::parallel_for(0, problem.H, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> scratch(problem.backward_scratch());
    for (int64_t h = begin; h < end; ++h) {
      feature(problem, g, h, scratch.data(), da, db, dwr, dwi);
    }
  });
}

Tensor nplr_forward(
    const Tensor& a, const Tensor& b, const Tensor& wr, const Tensor& wi, const Tensor& c,
    const Tensor& s, const std::optional<Tensor>& gamma) {
  const int64_t channels = check_all(a, b, wr, wi, c, s, gamma);
  Tensor k_f = at::empty({channels, a.size(2), c.size(0), 2}, a.options());
  if (a.scalar_type() == at::kFloat) {
    forward(problem_of<float>(a, b, wr, wi, c, s, gamma, channels), k_f.mutable_data_ptr<float>());
  } else {
    forward(
        problem_of<double>(a, b, wr, wi, c, s, gamma, channels), k_f.mutable_data_ptr<double>());
  }
  return k_f;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nplr_backward(
    const Tensor& g, const Tensor& a, const Tensor& b, const Tensor& wr, const Tensor& wi,
    const Tensor& c, const Tensor& s, const std::optional<Tensor>& gamma) {
  const int64_t channels = check_all(a, b, wr, wi, c, s, gamma);
  sssd::check_like(g, "nplr: g", {channels, a.size(2), c.size(0), 2}, a);
  Tensor da = at::empty_like(a), db = at::empty_like(b);
  Tensor dwr = gamma ? at::empty({0}, a.options()) : at::empty_like(wr);
  Tensor dwi = gamma ? at::empty({0}, a.options()) : at::empty_like(wi);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward(
        problem_of<T>(a, b, wr, wi, c, s, gamma, channels), g.const_data_ptr<T>(),
        da.mutable_data_ptr<T>(), db.mutable_data_ptr<T>(), dwr.mutable_data_ptr<T>(),
        dwi.mutable_data_ptr<T>());
  };
  a.scalar_type() == at::kFloat ? run(0.0f) : run(0.0);
  return {da, db, dwr, dwi};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sssd_hpc_cpp, m) {
  m.def(
      "nplr_forward(Tensor a, Tensor b, Tensor wr, Tensor wi, Tensor c, Tensor s, "
      "Tensor? gamma) -> Tensor",
      &nplr_forward);
  m.def(
      "nplr_backward(Tensor g, Tensor a, Tensor b, Tensor wr, Tensor wi, Tensor c, Tensor s, "
      "Tensor? gamma) -> (Tensor, Tensor, Tensor, Tensor)",
      &nplr_backward);
}
