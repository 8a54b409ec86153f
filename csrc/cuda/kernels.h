// Launches the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/table.h"

namespace fastsgd::cuda {

cudaError_t launch(const Launch& what, const void* arguments, cudaStream_t stream);

// An error where the kernels were not compiled for the current device.
cudaError_t look_for_code();

}  // namespace fastsgd::cuda
