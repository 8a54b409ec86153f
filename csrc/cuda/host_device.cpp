// Kernels on a device fuse multiply-adds; here a library does, where the processor cannot.
#define FASTSGD_FUSED_MULTIPLY_ADD 1

#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "cuda/device.h"
#include "cuda/emulation.h"
#include "cuda/list.h"

namespace fastsgd::cuda {
namespace {

using Body = void (*)(const Launch&, const Tables&, const Hypers*, char* const*);

void count_if_last(const Launch& what, const Tables& tables) {
  if (!tables.counts || !is_last(tables.standing->ticket, what.blocks)) return;
  all_threads([&](int thread) { count(tables, thread); });
}

// What a block finds in its shared memory: anything.
template <class Object>
Object found_in_memory() {
  Object object;
  std::memset(static_cast<void*>(&object), 0xa5, sizeof(object));
  return object;
}

// Blocks are in no order: every other launch has the last one first.
template <class Act>
void each_block(const Launch& what, Act act) {
  const bool from_end = emulated_work().launches % 2 != 0;
  for (int b = 0; b < what.blocks; ++b) act(from_end ? what.blocks - 1 - b : b);
}

// One launch, block by block and thread by thread, as the kernel does it.
template <class R, int kStructure, class T, bool kAround>
void step(const Launch& what, const Tables& tables, const Hypers* hypers, char* const* grads) {
  const bool skip = skips(tables);
  if (skip && !(kAround && tables.around.clears)) return;
  each_block(what, [&](int b) {
    auto block = found_in_memory<Block<R, kStructure, T, kAround>>();
    block.compute(tables, hypers, b);
    block.find(tables, grads, b, what.laid_out);
    all_threads([&](int thread) {
      skip            ? block.clear(thread, what.laid_out)
      : what.laid_out ? block.run_laid_out(thread)
                      : block.run_flat(thread);
    });
    if (!skip) count_if_last(what, tables);
  });
}

template <class What, class T>
void pairs(const Launch& what, const Tables& tables, const Hypers*, char* const* grads) {
  if (skips(tables)) return;
  each_block(what, [&](int b) {
    auto block = found_in_memory<PairBlock<What, T>>();
    block.prepare(tables, grads, b, what.laid_out);
    all_threads(
        [&](int thread) { what.laid_out ? block.run_laid_out(thread) : block.run_flat(thread); });
    count_if_last(what, tables);
  });
}

template <Order kOrder, class T>
void measure(const Launch& what, const Tables& tables, const Hypers*, char* const* grads) {
  each_block(what, [&](int b) {
    auto piece = found_in_memory<PieceBlock<T>>();
    auto found = found_in_memory<Measured>();
    bool last = true;  // anything, too
    measure_block<kOrder>(tables, grads, b, what.blocks, what.laid_out, piece, found, last);
  });
}

template <bool kAround>
struct Bodies {
  Body body[kDeviceKernels] = {};

  Bodies() { fill_device_kernels<kAround>(body, *this); }

  template <class R, int kStructure, class T>
  Body step() const {
    return cuda::step<R, kStructure, T, kAround>;
  }
  template <class What, class T>
  Body pairs() const {
    return cuda::pairs<What, T>;
  }
  template <Order kOrder, class T>
  Body measure() const {
    return cuda::measure<kOrder, T>;
  }
};

void zero(const Launch& what, const Tables& tables) {
  each_block(what, [&](int b) { all_threads([&](int thread) { zero_bytes(tables, b, thread); }); });
}

template <class A>
void run(const Launch& what, const void* in) {
  static const Bodies<false> plain;
  static const Bodies<true> around;
  const A& arguments = *static_cast<const A*>(in);
  EmulatedWork& work = emulated_work();
  ++work.launches;
  work.large += !what.few && !what.around && !what.laid_out && is_step(what.kernel);
  work.tables += arguments.tables.hypers != nullptr && arguments.tables.grads != nullptr;
  if (what.kernel == kZero) return zero(what, arguments.tables);
  const bool any = what.around || what.laid_out;
  const Body body = (any ? around.body : plain.body)[what.kernel];
  body(what, arguments.tables, arguments.hypers, arguments.grads);
}

class HostDevice final : public Device {
 public:
  c10::Device tensors() const override { return at::kCPU; }
  int processors() const override { return 4; }
  bool captures() const override { return emulated_work().captures; }
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
  std::int64_t read(const std::int64_t* there) override { return *there; }
  void prepare(const Launch&) override {}
  void launch(const Launch& what, const void* arguments) override {
    what.few ? run<FewArguments>(what, arguments) : run<ManyArguments>(what, arguments);
  }
  void begin() override {}
  void end() override {}
};

}  // namespace

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

}  // namespace fastsgd::cuda
