// The CUDA kernels. Free of torch, so that nvcc compiles them wherever it is.
#include "cuda/kernels.h"

#include <type_traits>

#include "cuda/block.h"

namespace fastsgd::cuda {
namespace {

// So many blocks share a processor at least: without a number nvcc spills to fit more.
constexpr int kBlocks = 2;

// The last block to have read the counters of a launch moves them on, for all.
__device__ bool is_last(unsigned* ticket) {
  __threadfence();
  const bool last = atomicAdd(ticket, 1) == gridDim.x - 1;
  if (last) *ticket = 0;
  return last;
}

template <class R, int kStructure, class T, class A, bool kLaidOut>
__global__ void __launch_bounds__(kThreads, kBlocks) step(const __grid_constant__ A arguments) {
  __shared__ Block<R, kStructure, T> block;
  __shared__ bool last;
  const Tables& tables = arguments.tables;
  if (skips(tables)) return;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    block.prepare(tables, arguments.hypers, arguments.grads, blockIdx.x, kLaidOut);
    last = tables.counts && is_last(tables.ticket);
  }
  __syncthreads();
  if (last) {
    for (int i = thread; i < tables.item_count; i += kThreads) count_step(tables.items[i]);
  }
  if constexpr (kLaidOut) {
    block.run_laid_out(thread);
  } else {
    const Block<R, kStructure, T> mine = block;  // in registers
    mine.run_flat(thread);
  }
}

__global__ void zero(const __grid_constant__ FewArguments arguments) {
  zero_bytes(arguments.tables, blockIdx.x, static_cast<int>(threadIdx.x));
}

// --- by number ----------------------------------------------------------------------------------

// Those that lie flat, and those that are laid out: these always take many arguments.
template <class A>
struct Steps {
  void (*step[2][kKernels])(A) = {};

  Steps() {
    fill<false>(step[0]);
    if constexpr (std::is_same_v<A, ManyArguments>) fill<true>(step[1]);
  }
  template <bool kLaidOut>
  static void fill(void (**table)(A)) {
    fill_kernels(
        table,
        []<class R, int kStructure, class T>(Instance<R, kStructure, T>) {
          return cuda::step<R, kStructure, T, A, kLaidOut>;
        },
        Rules{});
  }
};

template <class A>
const void* step_of(const Launch& what) {
  static const Steps<A> steps;
  return reinterpret_cast<const void*>(steps.step[what.laid_out][what.kernel]);
}

const void* kernel(const Launch& what) {
  if (what.kernel == kZero) return reinterpret_cast<const void*>(zero);
  return what.few ? step_of<FewArguments>(what) : step_of<ManyArguments>(what);
}

}  // namespace

cudaError_t launch(const Launch& what, const void* arguments, cudaStream_t stream) {
  void* parameters[] = {const_cast<void*>(arguments)};
  return cudaLaunchKernel(kernel(what), what.blocks, kThreads, parameters, 0, stream);
}

cudaError_t load(const Launch& what) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel(what));
}

}  // namespace fastsgd::cuda
