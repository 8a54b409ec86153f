// A host that stands for a device.
#pragma once

namespace fastsgd::cuda {

// Whether plain CPU tensors are taken for a device's, on which the host does what kernels would do:
// slowly, to test their code and tables. Off unless switched on.
bool emulated();
void emulate(bool on);

}  // namespace fastsgd::cuda
