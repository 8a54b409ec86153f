// Launches the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/table.h"

namespace fastsgd::cuda {

cudaError_t launch(const Launch& what, const void* arguments, cudaStream_t stream);

// Brings a kernel's code to the current device; an error where it was not compiled for that.
cudaError_t load(const Launch& what);

}  // namespace fastsgd::cuda
