// A host that stands for a device.
#pragma once

#include <cstdint>

namespace fastsgd::cuda {

// Whether plain CPU tensors are taken for a device's, on which the host does what kernels would do:
// slowly, to test their code and tables. Off unless switched on.
bool emulated();
void emulate(bool on);

struct EmulatedWork {
  // Asked for so far; and of the launches those of a step alone whose arguments are the large
  // ones, and those for which even these were too small, so that there is a table.
  std::int64_t launches = 0, uploads = 0, large = 0, tables = 0;
  bool captures = false;  // a graph: only said, nothing is recorded
};
EmulatedWork& emulated_work();

}  // namespace fastsgd::cuda
