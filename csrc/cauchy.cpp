// sssd_hpc_cpp::cauchy_forward and cauchy_backward: the Cauchy sum on the processor.
//
// A row is worked on by one thread, and rows are added in their order, so that results do not
// depend on the number of threads. Shapes are those of sssd_hpc/ops/cauchy.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "host.h"

namespace sssd {
// Nodes that are worked on at a time; a multiple of every level's vector.
constexpr int64_t kCauchyTile = 128;
constexpr int64_t kCauchyLanes = 16;
} // namespace sssd

#define SSSD_KERNELS "cauchy_kernels.h"
#include "dispatch.h"

namespace {

using at::Tensor;

void check_all(const Tensor& v, const Tensor& z, const Tensor& w) {
  sssd::check_real(v, "cauchy: v");
  TORCH_CHECK(
      v.dim() == 3 && z.dim() == 3 && v.numel() > 0 && z.numel() > 0,
      "cauchy: v has shape ", v.sizes(), " and z ", z.sizes(),
      "; expected (R, N2, 2) and (R or 1, L, 2), not empty");
  const int64_t R = v.size(0), N2 = v.size(1), rows = z.size(0) == 1 ? 1 : R;
  sssd::check_like(v, "cauchy: v", {R, N2, 2}, v);
  sssd::check_like(w, "cauchy: w", {R, N2, 2}, v);
  sssd::check_like(z, "cauchy: z", {rows, z.size(1), 2}, v);
}

template <class T>
void forward(const Tensor& v_, const Tensor& z_, const Tensor& w_, Tensor& r_) {
  const T* v = v_.const_data_ptr<T>();
  const T* z = z_.const_data_ptr<T>();
  const T* w = w_.const_data_ptr<T>();
  T* r = r_.mutable_data_ptr<T>();
  const int64_t R = v_.size(0), N2 = v_.size(1), L = z_.size(1);
  const int64_t step = z_.size(0) == 1 ? 0 : 2 * L;
  auto* row = SSSD_BEST(cauchy_forward_row<T>);
  // A piece is one tile of a row where there are few rows, else all of them.
  const int64_t tile = sssd::kCauchyTile, tiles = (L + tile - 1) / tile;
  const int64_t per_piece = R >= 4 * at::get_num_threads() ? tiles : 1;
  const int64_t pieces = (tiles + per_piece - 1) / per_piece;
  at::parallel_for(0, R * pieces, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> scratch(4 * tile);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i / pieces, l0 = i % pieces * per_piece * tile;
      const int64_t l1 = std::min(L, l0 + per_piece * tile);
      row(v + 2 * k * N2, z + k * step, w + 2 * k * N2, N2, l0, l1, scratch.data(), r + 2 * k * L);
    }
  });
}

template <class T>
void backward(
    const Tensor& g_, const Tensor& v_, const Tensor& z_, const Tensor& w_, Tensor& dv_,
    Tensor& dz_, Tensor& dw_) {
  const T* g = g_.const_data_ptr<T>();
  const T* v = v_.const_data_ptr<T>();
  const T* z = z_.const_data_ptr<T>();
  const T* w = w_.const_data_ptr<T>();
  T* dv = dv_.mutable_data_ptr<T>();
  T* dw = dw_.mutable_data_ptr<T>();
  const int64_t R = v_.size(0), N2 = v_.size(1), L = z_.size(1);
  const int64_t step = z_.size(0) == 1 ? 0 : 2 * L;
  const bool need_z = dz_.numel() > 0, shared = need_z && step == 0 && R > 1;
  // Rows that share their nodes leave one gradient each, which are added at the end.
  Tensor rows = shared ? at::empty({R, L, 2}, v_.options()) : dz_;
  T* dz = need_z ? rows.mutable_data_ptr<T>() : nullptr;
  auto* row = SSSD_BEST(cauchy_backward_row<T>);
  at::parallel_for(0, R, 1, [&](int64_t begin, int64_t end) {
    sssd::Scratch<T> scratch(6 * sssd::kCauchyTile + 4 * N2 * sssd::kCauchyLanes);
    for (int64_t k = begin; k < end; ++k) {
      row(g + 2 * k * L, v + 2 * k * N2, z + k * step, w + 2 * k * N2, N2, L, scratch.data(),
          dv + 2 * k * N2, dz ? dz + 2 * k * L : nullptr, dw + 2 * k * N2);
    }
  });
  if (shared) {
    auto* add = SSSD_BEST(cauchy_add_rows<T>);
    T* total = dz_.mutable_data_ptr<T>();
    at::parallel_for(0, 2 * L, 256, [&](int64_t begin, int64_t end) {
      add(dz, R, 2 * L, begin, end, total);
    });
  }
}

Tensor cauchy_forward(const Tensor& v, const Tensor& z, const Tensor& w) {
  check_all(v, z, w);
  Tensor r = at::empty({v.size(0), z.size(1), 2}, v.options());
  v.scalar_type() == at::kFloat ? forward<float>(v, z, w, r) : forward<double>(v, z, w, r);
  return r;
}

std::tuple<Tensor, Tensor, Tensor> cauchy_backward(
    const Tensor& g, const Tensor& v, const Tensor& z, const Tensor& w, bool need_z) {
  check_all(v, z, w);
  sssd::check_like(g, "cauchy: g", {v.size(0), z.size(1), 2}, v);
  Tensor dv = at::empty_like(v), dw = at::empty_like(w);
  Tensor dz = need_z ? at::empty_like(z) : at::empty({0}, z.options());
  if (v.scalar_type() == at::kFloat) {
    backward<float>(g, v, z, w, dv, dz, dw);
  } else {
    backward<double>(g, v, z, w, dv, dz, dw);
  }
  return {dv, dz, dw};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sssd_hpc_cpp, m) {
  m.def("cauchy_forward(Tensor v, Tensor z, Tensor w) -> Tensor", &cauchy_forward);
  m.def(
      "cauchy_backward(Tensor g, Tensor v, Tensor z, Tensor w, bool need_z) -> "
      "(Tensor, Tensor, Tensor)",
      &cauchy_backward);
}
