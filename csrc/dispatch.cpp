// Ops that say and set the level of vector instructions, for tests and benchmarks.

#include <torch/library.h>

#include "dispatch.h"

namespace {

std::string cpu_level() {
  return sssd::kLevelNames[static_cast<int>(sssd::level().load())];
}

std::string widest_cpu_level() {
  return sssd::kLevelNames[static_cast<int>(sssd::widest_level())];
}

void set_cpu_level(const std::string& name) {
  sssd::level() = sssd::level_named(name, "the CPU level");
}

} // namespace

TORCH_LIBRARY_FRAGMENT(sssd_hpc_cpp, m) {
  m.def("cpu_level() -> str", &cpu_level);
  m.def("widest_cpu_level() -> str", &widest_cpu_level);
  m.def("set_cpu_level(str name) -> ()", &set_cpu_level);
}
