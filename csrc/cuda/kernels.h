// Launches the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/table.h"

namespace fastsgd::cuda {

template <class A>
cudaError_t launch(const Launch& what, const A& arguments, cudaStream_t stream);

}  // namespace fastsgd::cuda
