#include "cuda/cuda_device.h"

#if FASTSGD_CUDA

#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <unordered_set>
#include <utility>

#include "cuda/kernels.h"

namespace fastsgd::cuda {
namespace {

// Frees memory that is not the caching allocator's.
void free_own(void* memory) {
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  C10_CUDA_CHECK_WARN(cudaFree(memory));
}

// Everything is done on the current stream of the device, as torch's operators do it.
class CudaDevice final : public Device {
 public:
  explicit CudaDevice(c10::Device device) : device_(device) {
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device.index()));
  }

  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;
  ~CudaDevice() override {
    if (done_ != nullptr) static_cast<void>(cudaEventDestroy(done_));
  }

  c10::Device tensors() const override { return device_; }
  int processors() const override { return processors_; }
  bool captures() const override {
    const c10::cuda::CUDAGuard guard(device_);
    cudaStreamCaptureStatus status{};
    C10_CUDA_CHECK(cudaStreamIsCapturing(current(), &status));
    return status != cudaStreamCaptureStatusNone;
  }

  // During a capture the caching allocator gives memory of the graph's own, which the graph may use
  // for something else before it comes to this step: so it is not asked.
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::cuda::CUDAGuard guard(device_);
    if (!captures()) return c10::cuda::CUDACachingAllocator::get()->allocate(bytes);
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    void* memory = nullptr;
    C10_CUDA_CHECK(cudaMalloc(&memory, bytes));
    return {memory, memory, free_own, device_};
  }
  std::int64_t stream() const override { return current().id(); }
  void used(const c10::DataPtr& memory) override {
    if (memory.get_deleter() == free_own) return;  // to free it waits for the device
    c10::cuda::CUDACachingAllocator::recordStream(memory, current());
  }

  void upload(void* to, const void* from, std::size_t bytes) override {
    const auto copy = [&](const void* source, cudaStream_t stream) {
      C10_CUDA_CHECK(cudaMemcpyAsync(to, source, bytes, cudaMemcpyHostToDevice, stream));
    };
    // The copy is waited for, and torch's pinned memory would be the graph's.
    if (captures()) return unrecorded([&](cudaStream_t stream) { copy(from, stream); });
    // The bytes are gone when this returns, and a copy of pageable memory would wait for the
    // device.
    const c10::cuda::CUDAGuard guard(device_);
    auto* allocator = at::getHostAllocator(at::kCUDA);
    const c10::DataPtr pinned = allocator->allocate(bytes);
    std::memcpy(pinned.get(), from, bytes);
    copy(pinned.get(), current());
    allocator->record_event(pinned.get(), pinned.get_context(), current().unwrap());
  }
  void zero(void* memory, std::size_t bytes) override {
    unrecorded(
        [&](cudaStream_t stream) { C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream)); });
  }

  std::int64_t read(const std::int64_t* there) override {
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cudaDeviceSynchronize());  // whatever stream it was asked for on
    std::int64_t number = 0;
    C10_CUDA_CHECK(cudaMemcpy(&number, there, sizeof(number), cudaMemcpyDeviceToHost));
    return number;
  }

  void prepare(const Launch& what) override {
    const std::int64_t number =
        ((what.kernel * 2 + what.laid_out) * 2 + what.around) * 2 + what.few;
    if (!loaded_.insert(number).second) return;
    const c10::cuda::CUDAGuard guard(device_);
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const cudaError_t error = load(what);
    if (error != cudaSuccess) loaded_.erase(number);
    C10_CUDA_CHECK(error);
  }
  void launch(const Launch& what, const void* arguments) override {
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cuda::launch(what, arguments, current()));
  }

  // Tables and counts are the same on every stream, which are in no order by themselves. A graph
  // has an order of its own, with what is before and after it left to whoever replays it.
  void begin() override {
    if (captures()) return;
    const c10::cuda::CUDAGuard guard(device_);
    if (done_ == nullptr) C10_CUDA_CHECK(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming));
    // A step that failed has no end to wait for.
    if (std::exchange(open_, true)) C10_CUDA_CHECK(cudaDeviceSynchronize());
    if (stream_ != stream()) C10_CUDA_CHECK(cudaStreamWaitEvent(current(), done_, 0));
  }
  void end() override {
    if (captures()) return;
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cudaEventRecord(done_, current()));
    stream_ = stream();
    open_ = false;
  }

 private:
  c10::cuda::CUDAStream current() const { return c10::cuda::getCurrentCUDAStream(device_.index()); }

  // On the current stream; during a capture on one of our own, and over when this returns. (One of
  // torch's could be the very one that captures.)
  template <class Act>
  void unrecorded(Act act) {
    const c10::cuda::CUDAGuard guard(device_);
    if (!captures()) return act(current());
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    static std::array<cudaStream_t, C10_COMPILE_TIME_MAX_GPUS> made{};  // kept for good
    cudaStream_t& own = made[static_cast<std::size_t>(device_.index())];
    if (own == nullptr) C10_CUDA_CHECK(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
    act(own);
    C10_CUDA_CHECK(cudaStreamSynchronize(own));
  }

  c10::Device device_;
  int processors_ = 0;
  // The end of the last work that was not recorded, and its stream, which may be gone since.
  cudaEvent_t done_ = nullptr;
  std::int64_t stream_ = 0;
  bool open_ = false;  // no end yet
  std::unordered_set<std::int64_t> loaded_;
};

constexpr int kLongArguments = 12010;  // the first driver that takes more than 4 KB of them

// Whether an error of loading says that this build has nothing for the device.
bool has_no_code(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
}

}  // namespace

std::unique_ptr<Device> cuda_device(c10::Device device) {
  return std::make_unique<CudaDevice>(device);
}

bool runs_on(c10::Device device) {
  enum Answer : std::uint8_t { kUnasked, kNo, kYes };
  static std::array<Answer, C10_COMPILE_TIME_MAX_GPUS> answers{};
  const int index = device.has_index() ? device.index() : c10::cuda::current_device();
  Answer& answer = answers[static_cast<std::size_t>(index)];
  if (answer == kUnasked) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const cudaError_t error = load({kZero, false, false, true, 0});
    if (has_no_code(error)) {
      static_cast<void>(cudaGetLastError());  // or torch would find it
    } else {
      C10_CUDA_CHECK(error);
    }
    int driver = 0;
    C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
    answer = error == cudaSuccess && driver >= kLongArguments ? kYes : kNo;
  }
  return answer == kYes;
}

}  // namespace fastsgd::cuda

#endif
