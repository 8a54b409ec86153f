// The CUDA kernels. Free of torch, so that nvcc compiles them wherever it is.
#include "cuda/kernels.h"

#include <type_traits>

#include "cuda/measure.h"
#include "cuda/pairs.h"
#include "cuda/step.h"

namespace fastsgd::cuda {
namespace {

// So many blocks share a processor at least: without a number nvcc spills to fit more.
constexpr int kBlocks = 2;

__device__ int thread_here() { return static_cast<int>(threadIdx.x); }
__device__ int blocks_here() { return static_cast<int>(gridDim.x); }

// Whether this block is to count for all of a launch: the last to have read the counters is.
__device__ bool is_to_count(const Tables& tables) {
  return tables.counts && is_last(tables.standing->ticket, blocks_here());
}

template <class R, int kStructure, class T, class A, bool kLaidOut, bool kAround>
__global__ void __launch_bounds__(kThreads, kBlocks) step(const __grid_constant__ A arguments) {
  __shared__ Block<R, kStructure, T, kAround> block;
  __shared__ bool counts;
  const Tables& tables = arguments.tables;
  const bool skip = skips(tables);
  if (skip && !(kAround && tables.around.clears)) return;
  const int thread = thread_here();
  if (thread == 0) {
    block.prepare(tables, arguments.hypers, arguments.grads, blockIdx.x, kLaidOut);
    counts = !skip && is_to_count(tables);
  }
  __syncthreads();
  if constexpr (kAround) {
    if (skip) return block.clear(thread, kLaidOut);
  }
  if (counts) count(tables, thread);
  if constexpr (kLaidOut) {
    block.run_laid_out(thread);
  } else {
    const Block<R, kStructure, T, kAround> mine = block;  // in registers
    mine.run_flat(thread);
  }
}

template <class What, class T, class A, bool kLaidOut>
__global__ void __launch_bounds__(kThreads, kBlocks) pairs(const __grid_constant__ A arguments) {
  __shared__ PairBlock<What, T> block;
  __shared__ bool counts;
  const Tables& tables = arguments.tables;
  if (skips(tables)) return;
  const int thread = thread_here();
  if (thread == 0) {
    block.prepare(tables, arguments.grads, blockIdx.x, kLaidOut);
    counts = is_to_count(tables);
  }
  __syncthreads();
  if (counts) count(tables, thread);
  if constexpr (kLaidOut) {
    block.run_laid_out(thread);
  } else {
    const PairBlock<What, T> mine = block;
    mine.run_flat(thread);
  }
}

template <Order kOrder, class T, class A, bool kLaidOut>
__global__ void __launch_bounds__(kThreads, kBlocks) measure(const __grid_constant__ A arguments) {
  __shared__ PieceBlock<T> piece;
  __shared__ Measured found;
  __shared__ bool last;
  measure_block<kOrder>(arguments.tables, arguments.grads, blockIdx.x, blocks_here(), kLaidOut,
                        piece, found, last);
}

__global__ void zero(const __grid_constant__ FewArguments arguments) {
  zero_bytes(arguments.tables, blockIdx.x, thread_here());
}

// --- by number ----------------------------------------------------------------------------------

// The kernels of one way to lie in memory, one size of arguments, with and without the rest of what
// is done around the rule.
template <class A, bool kLaidOut, bool kAround>
struct Kernels {
  void (*kernel[kDeviceKernels])(A) = {};

  Kernels() {
    fill_kernels(
        kernel,
        []<class R, int kStructure, class T>(Instance<R, kStructure, T>) {
          return cuda::step<R, kStructure, T, A, kLaidOut, kAround>;
        },
        Rules{});
    if constexpr (kAround) {
      fill_others<float>(Storage::kFloat);
      fill_others<double>(Storage::kDouble);
      fill_others<BFloat16>(Storage::kBFloat16);
      fill_others<Half>(Storage::kHalf);
    }
  }
  template <class T>
  void fill_others(Storage storage) {
    const int type = static_cast<int>(storage);
    fill_pairs<T>(type, List<Averaging, Clipping, Exchanging>{});
    kernel[kSquares + type] = measure<Order::kTwo, T, A, kLaidOut>;
    kernel[kMagnitude + type] = measure<Order::kInfinity, T, A, kLaidOut>;
  }
  template <class T, class... What>
  void fill_pairs(int type, List<What...>) {
    ((kernel[What::kKernel + type] = pairs<What, T, A, kLaidOut>), ...);
  }
};

template <class A, bool kLaidOut, bool kAround>
const void* find(int number) {
  static const Kernels<A, kLaidOut, kAround> kernels;
  return reinterpret_cast<const void*>(kernels.kernel[number]);
}

const void* kernel(const Launch& what) {
  if (what.kernel == kZero) return reinterpret_cast<const void*>(zero);
  if (what.laid_out) return find<ManyArguments, true, true>(what.kernel);
  if (what.around) return find<ManyArguments, false, true>(what.kernel);
  if (!what.few) return find<ManyArguments, false, false>(what.kernel);
  return find<FewArguments, false, false>(what.kernel);
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
