// A CUDA device.
#pragma once

#include <memory>

#include "cuda/device.h"

namespace fastsgd::cuda {

std::unique_ptr<Device> cuda_device(c10::Device device);

// Whether the kernels were compiled for it.
bool runs_on(c10::Device device);

}  // namespace fastsgd::cuda
