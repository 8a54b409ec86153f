// The CUDA kernels. Free of torch, so that nvcc compiles them wherever it is.
#include "cuda/kernels.h"

#include "cuda/list.h"

namespace fastsgd::cuda {
namespace {

// So many blocks share a processor at least: without a number nvcc spills to fit more.
constexpr int kBlocks = 2;
// Of steps: where they lie flat and nothing is done around the rule, four leave 64 registers to a
// thread, which are enough but for float64, and for many packs of halves, of eight elements each.
template <class T, int kStates, bool kMore>
constexpr int kStepBlocks =
    kMore || sizeof(T) == 8 || (sizeof(T) == 2 && kStates > 2) ? kBlocks : 4;
// Threads that do one thing at a time.
constexpr int kWarp = 32;

__device__ int thread_here() { return static_cast<int>(threadIdx.x); }
__device__ int blocks_here() { return static_cast<int>(gridDim.x); }

// Memory that a block shares, for an object that one of its threads makes: shared variables are not
// constructed.
template <class Object>
struct Room {
  alignas(Object) unsigned char memory[sizeof(Object)];
  __device__ Object& object() { return *reinterpret_cast<Object*>(memory); }
};

// A thread's share of what a block does.
template <bool kLaidOut, class B>
__device__ void run(const B& block, int thread) {
  if constexpr (kLaidOut) {
    block.run_laid_out(thread);
  } else {
    const B mine = block;  // in registers
    mine.run_flat(thread);
  }
}

// The same of a block that has read the counters; the last that has counts the step. One thread
// asks whether it is this one, and waits for memory's answer, while the others are at work.
template <bool kLaidOut, class B>
__device__ void run_and_count(const B& block, const Tables& tables, int thread) {
  __shared__ bool counts;
  if (tables.counts && thread == 0) counts = is_last(tables.standing->ticket, blocks_here());
  run<kLaidOut>(block, thread);
  if (!tables.counts) return;
  __syncthreads();
  if (counts) count(tables, thread);
}

template <class R, int kStructure, class T, class A, bool kLaidOut, bool kAround>
__global__ void __launch_bounds__(
    kThreads, kStepBlocks<T, size_of(R::states(kStructure)), kLaidOut || kAround>)
    step(const __grid_constant__ A arguments) {
  __shared__ Room<Block<R, kStructure, T, kAround>> room;
  auto& block = room.object();
  const Tables& tables = arguments.tables;
  const bool skip = skips(tables);
  if (skip && !(kAround && tables.around.clears)) return;
  const int thread = thread_here();
  if (thread == 0) {
    block.compute(tables, arguments.hypers, blockIdx.x);
  } else if (thread == kWarp) {  // beside it
    block.find(tables, arguments.grads, blockIdx.x, kLaidOut);
  }
  __syncthreads();
  if constexpr (kAround) {
    if (skip) return block.clear(thread, kLaidOut);
  }
  run_and_count<kLaidOut>(block, tables, thread);
}

template <class What, class T, class A, bool kLaidOut>
__global__ void __launch_bounds__(kThreads, kBlocks) pairs(const __grid_constant__ A arguments) {
  __shared__ Room<PairBlock<What, T>> room;
  auto& block = room.object();
  const Tables& tables = arguments.tables;
  if (skips(tables)) return;
  const int thread = thread_here();
  if (thread == 0) block.prepare(tables, arguments.grads, blockIdx.x, kLaidOut);
  __syncthreads();
  run_and_count<kLaidOut>(block, tables, thread);
}

template <Order kOrder, class T, class A, bool kLaidOut>
__global__ void __launch_bounds__(kThreads, kBlocks) measure(const __grid_constant__ A arguments) {
  __shared__ Room<PieceBlock<T>> piece;
  __shared__ Room<Measured> found;
  __shared__ bool last;
  measure_block<kOrder>(arguments.tables, arguments.grads, blockIdx.x, blocks_here(), kLaidOut,
                        piece.object(), found.object(), last);
}

__global__ void zero(const __grid_constant__ FewArguments arguments) {
  zero_bytes(arguments.tables, blockIdx.x, thread_here());
}

// --- by number ----------------------------------------------------------------------------------

// Those of one way to lie in memory, one size of arguments, with and without the rest of what is
// done around the rule.
template <class A, bool kLaidOut, bool kAround>
struct Kernels {
  using Kernel = void (*)(A);
  Kernel kernel[kDeviceKernels] = {};

  Kernels() { fill_device_kernels<kAround>(kernel, *this); }

  template <class R, int kStructure, class T>
  Kernel step() const {
    return cuda::step<R, kStructure, T, A, kLaidOut, kAround>;
  }
  template <class What, class T>
  Kernel pairs() const {
    return cuda::pairs<What, T, A, kLaidOut>;
  }
  template <Order kOrder, class T>
  Kernel measure() const {
    return cuda::measure<kOrder, T, A, kLaidOut>;
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
