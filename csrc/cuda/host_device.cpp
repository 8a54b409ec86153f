// Kernels on a device fuse multiply-adds; here a library does, where the processor cannot.
#define FASTSGD_FUSED_MULTIPLY_ADD 1

#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "cuda/block.h"
#include "cuda/device.h"
#include "cuda/emulation.h"

namespace fastsgd::cuda {
namespace {

// One launch, block by block and thread by thread, as the kernel does it.
template <class R, int kStructure, class T>
void step(const Launch& what, const Tables& tables, const Hypers* hypers, char* const* grads) {
  if (skips(tables)) return;
  for (int b = 0; b < what.blocks; ++b) {
    Block<R, kStructure, T> block;
    block.prepare(tables, hypers, grads, b, what.laid_out);
    for (int thread = 0; thread < kThreads; ++thread) {
      what.laid_out ? block.run_laid_out(thread) : block.run_flat(thread);
    }
  }
  if (!tables.counts) return;
  for (int i = 0; i < tables.item_count; ++i) count_step(tables.items[i]);
}

struct Steps {
  void (*step[kKernels])(const Launch&, const Tables&, const Hypers*, char* const*) = {};

  Steps() {
    fill_kernels(
        step,
        []<class R, int kStructure, class T>(Instance<R, kStructure, T>) {
          return cuda::step<R, kStructure, T>;
        },
        Rules{});
  }
};

void zero(const Launch& what, const Tables& tables) {
  for (int b = 0; b < what.blocks; ++b) {
    for (int thread = 0; thread < kThreads; ++thread) zero_bytes(tables, b, thread);
  }
}

template <class A>
void run(const Launch& what, const void* in) {
  static const Steps steps;
  const A& arguments = *static_cast<const A*>(in);
  if (what.kernel == kZero) return zero(what, arguments.tables);
  steps.step[what.kernel](what, arguments.tables, arguments.hypers, arguments.grads);
}

class HostDevice final : public Device {
 public:
  c10::Device tensors() const override { return at::kCPU; }
  int processors() const override { return 4; }
  bool captures() const override { return false; }
  c10::DataPtr allocate(std::size_t bytes) override {
    return c10::GetCPUAllocator()->allocate(bytes);
  }
  std::int64_t stream() const override { return 0; }
  void used(const c10::DataPtr&) override {}
  void upload(void* to, const void* from, std::size_t bytes) override {
    ++emulated_work().uploads;
    std::memcpy(to, from, bytes);
  }
  void zero(void* memory, std::size_t bytes) override { std::memset(memory, 0, bytes); }
  void prepare(const Launch&) override {}
  void launch(const Launch& what, const void* arguments) override {
    ++emulated_work().launches;
    what.few ? run<FewArguments>(what, arguments) : run<ManyArguments>(what, arguments);
  }
};

}  // namespace

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

}  // namespace fastsgd::cuda
