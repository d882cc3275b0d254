// What the ops do around their kernels: checks at the door and scratch memory.

#ifndef SSSD_HOST_H
#define SSSD_HOST_H

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

namespace sssd {

inline void check_real(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(
      tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name, " is ",
      tensor.scalar_type(), "; it must be float32 or float64");
}

// Refuses a tensor that is not of this shape, contiguous, on the processor and of `like`'s dtype.
inline void check_like(
    const at::Tensor& tensor, const char* name, at::IntArrayRef shape, const at::Tensor& like) {
  TORCH_CHECK(
      tensor.sizes() == shape && tensor.scalar_type() == like.scalar_type() &&
          tensor.device().is_cpu() && tensor.is_contiguous(),
      name, " is ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(),
      "; expected contiguous ", like.scalar_type(), " ", shape, " on cpu");
}

// Scratch memory of one thread, from a cache line on; uninitialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(new T[size + 64 / sizeof(T)]) {}

  T* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<T[]> memory_;
};

} // namespace sssd

#endif // SSSD_HOST_H
