// sssd_hpc_cpp::residual_norm, gate and their backwards: the pointwise parts of a residual block on
// the processor, in (B, H, L) layout.
//
// Work is divided into tiles that depend on shapes alone and sums over tiles are taken in order, so
// that results do not depend on the number of threads. Shapes are those of sssd_hpc/ops/block.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "block.h"
#include "host.h"

#define SSSD_KERNELS "block_kernels.h"
#include "dispatch.h"

namespace {

using at::Tensor;

// Elements of the gate that are worth a thread of their own.
constexpr int64_t kGatePiece = 16384;

void check(
    const Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(
      tensor.sizes() == shape && tensor.scalar_type() == dtype && tensor.device().is_cpu() &&
          tensor.is_contiguous(),
      "block: ", name, " is ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(),
      "; expected contiguous ", dtype, " ", shape, " on cpu");
}

// Checks a signal and returns the type of its arithmetic.
at::ScalarType check_signal(const Tensor& x, const char* name) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16, "block: ", name,
      " is ", dtype, "; it must be float32, float64 or bfloat16");
  TORCH_CHECK(
      x.dim() == 3 && x.numel() > 0, "block: ", name, " has shape ", x.sizes(),
      "; expected (B, H, L), not empty");
  check(x, name, x.sizes(), dtype);
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls run(T{}, S{}) with the types of arithmetic and memory.
template <class F>
void dispatch(const Tensor& x, const F& run) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return run(double{}, double{});
    case at::kBFloat16:
      return run(float{}, sssd::Bf16{});
    default:
      return run(float{}, float{});
  }
}

template <class S>
const S* signal(const Tensor& x) {
  return static_cast<const S*>(x.const_data_ptr());
}

template <class S>
S* mutable_signal(Tensor& x) {
  return static_cast<S*>(x.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> residual_norm(
    const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& shift, double eps) {
  const auto wide = check_signal(x, "x");
  const int64_t B = x.size(0), H = x.size(1), L = x.size(2);
  check(y, "y", x.sizes(), x.scalar_type());
  check(weight, "weight", {H}, wide);
  check(bias, "bias", {H}, wide);
  if (shift) {
    check(*shift, "shift", {B, H}, wide);
  }
  Tensor out = at::empty_like(x);
  Tensor mean = at::empty({B, L}, weight.options()), rstd = at::empty_like(mean);
  dispatch(x, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    auto* tile = SSSD_BEST(norm_forward_tile<T, S>);
    const sssd::NormProblem<T, S> problem{
        signal<S>(x), signal<S>(y), weight.const_data_ptr<T>(), B, H, L};
    const T* offset = shift ? shift->const_data_ptr<T>() : nullptr;
    const int64_t tiles = problem.tiles(), width = problem.width();
    at::parallel_for(0, B * tiles, 1, [&](int64_t begin, int64_t end) {
      sssd::Scratch<T> scratch(problem.scratch());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t l0 = i % tiles * width;
        tile(
            problem, bias.const_data_ptr<T>(), offset, static_cast<T>(eps), i / tiles, l0,
            std::min(width, L - l0), scratch.data(), mutable_signal<S>(out),
            mean.mutable_data_ptr<T>(), rstd.mutable_data_ptr<T>());
      }
    });
  });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_backward(
    const Tensor& g, const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd) {
  const auto wide = check_signal(x, "x");
  const int64_t B = x.size(0), H = x.size(1), L = x.size(2);
  check(g, "g", x.sizes(), x.scalar_type());
  check(y, "y", x.sizes(), x.scalar_type());
  check(weight, "weight", {H}, wide);
  check(mean, "mean", {B, L}, wide);
  check(rstd, "rstd", {B, L}, wide);
  Tensor dsum = at::empty_like(x), dweight = at::empty_like(weight);
  Tensor dshift = at::empty({B, H}, weight.options());
  dispatch(x, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    auto* tile = SSSD_BEST(norm_backward_tile<T, S>);
    const sssd::NormProblem<T, S> problem{
        signal<S>(x), signal<S>(y), weight.const_data_ptr<T>(), B, H, L};
    const int64_t tiles = problem.tiles(), width = problem.width();
    // Each tile's dweight and dshift.
    sssd::Scratch<T> parts(2 * B * tiles * H);
    at::parallel_for(0, B * tiles, 1, [&](int64_t begin, int64_t end) {
      sssd::Scratch<T> scratch(problem.scratch());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t l0 = i % tiles * width;
        T* part = parts.data() + 2 * i * H;
        tile(
            problem, signal<S>(g), mean.const_data_ptr<T>(), rstd.const_data_ptr<T>(), i / tiles,
            l0, std::min(width, L - l0), scratch.data(), mutable_signal<S>(dsum), part, part + H);
      }
    });
    T* dw = dweight.mutable_data_ptr<T>();
    T* ds = dshift.mutable_data_ptr<T>();
    std::fill(dw, dw + H, T(0));
    // Tiles of a record first: sums of equally many terms keep more digits.
    std::vector<T> record(H);
    for (int64_t b = 0; b < B; ++b, ds += H) {
      std::fill(record.begin(), record.end(), T(0));
      std::fill(ds, ds + H, T(0));
      for (int64_t i = b * tiles; i < (b + 1) * tiles; ++i) {
        const T* part = parts.data() + 2 * i * H;
        for (int64_t h = 0; h < H; ++h) {
          record[h] += part[h];
          ds[h] += part[H + h];
        }
      }
      for (int64_t h = 0; h < H; ++h) {
        dw[h] += record[h];
      }
    }
  });
  return {dsum, dweight, dshift};
}

// Calls run(record, first, count) on pieces of the C * L values of each record.
template <class F>
void over_pieces(int64_t B, int64_t size, const F& run) {
  const int64_t pieces = (size + kGatePiece - 1) / kGatePiece;
  at::parallel_for(0, B * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kGatePiece;
      run(i / pieces, first, std::min(kGatePiece, size - first));
    }
  });
}

Tensor gate(const Tensor& h) {
  check_signal(h, "h");
  TORCH_CHECK(h.size(1) % 2 == 0, "block: h has ", h.size(1), " features; expected 2 C");
  const int64_t B = h.size(0), C = h.size(1) / 2, size = C * h.size(2);
  Tensor out = at::empty({B, C, h.size(2)}, h.options());
  dispatch(h, [&](auto t, auto s) {
    using S = decltype(s);
    auto* row = SSSD_BEST(gate_forward_row<decltype(t), S>);
    over_pieces(B, size, [&](int64_t b, int64_t first, int64_t count) {
      const S* a = signal<S>(h) + 2 * b * size + first;
      row(a, a + size, count, mutable_signal<S>(out) + b * size + first);
    });
  });
  return out;
}

Tensor gate_backward(const Tensor& g, const Tensor& h) {
  check_signal(h, "h");
  TORCH_CHECK(h.size(1) % 2 == 0, "block: h has ", h.size(1), " features; expected 2 C");
  const int64_t B = h.size(0), C = h.size(1) / 2, size = C * h.size(2);
  check(g, "g", {B, C, h.size(2)}, h.scalar_type());
  Tensor dh = at::empty_like(h);
  dispatch(h, [&](auto t, auto s) {
    using S = decltype(s);
    auto* row = SSSD_BEST(gate_backward_row<decltype(t), S>);
    over_pieces(B, size, [&](int64_t b, int64_t first, int64_t count) {
      const S* a = signal<S>(h) + 2 * b * size + first;
      S* da = mutable_signal<S>(dh) + 2 * b * size + first;
      row(signal<S>(g) + b * size + first, a, a + size, count, da, da + size);
    });
  });
  return dh;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sssd_hpc_cpp, m) {
  m.def(
      "residual_norm(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor? shift, float eps) "
      "-> (Tensor, Tensor, Tensor)",
      &residual_norm);
  m.def(
      "residual_norm_backward(Tensor g, Tensor x, Tensor y, Tensor weight, Tensor mean, "
      "Tensor rstd) -> (Tensor, Tensor, Tensor)",
      &residual_norm_backward);
  m.def("gate(Tensor h) -> Tensor", &gate);
  m.def("gate_backward(Tensor g, Tensor h) -> Tensor", &gate_backward);
}
