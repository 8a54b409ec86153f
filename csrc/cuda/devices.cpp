#include "cuda/devices.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>

#include <utility>

#include "cuda/emulation.h"
#include "recent.h"

#if FASTSGD_CUDA
#include "cuda/cuda_device.h"
#endif

namespace fastsgd::cuda {
namespace {

bool emulates = false;

constexpr std::size_t kCounts = 1024;  // of first steps that share a piece of memory

// Null where there are no kernels.
std::unique_ptr<Device> device_for(c10::Device device) {
  if (emulates && device.is_cpu()) return host_device();
#if FASTSGD_CUDA
  if (device.is_cuda() && runs_on(device)) return cuda_device(device);
#endif
  return nullptr;
}

}  // namespace

bool has_kernels_for([[maybe_unused]] c10::Device device) {
#if FASTSGD_CUDA
  if (device.is_cuda()) return runs_on(device);
#endif
  return device.is_cpu();
}

bool emulated() { return emulates; }
void emulate(bool on) { emulates = on; }
EmulatedWork& emulated_work() {
  static EmulatedWork work;
  return work;
}

// --- first steps --------------------------------------------------------------------------------

char* FirstSteps::begin(Device& device, const at::Tensor& state) {
  if (counts_.size() >= worth_forgetting_) forget_the_dead();
  if (memory_ == nullptr || used_ == kCounts) {
    auto memory = device.allocate(kCounts * sizeof(float));
    device.begin();  // the step may yet fail, and the next one be on another stream
    device.zero(memory.get(), kCounts * sizeof(float));
    device.end();
    memory_ = std::make_shared<c10::DataPtr>(std::move(memory));
    used_ = 0;
    stream_.reset();
  }
  char* at = static_cast<char*>(memory_->get()) + used_++ * sizeof(float);
  counts_.insert_or_assign(
      state.unsafeGetTensorImpl(),
      Count{c10::weak_intrusive_ptr<c10::TensorImpl>(state.getIntrusivePtr()), memory_, at});
  return at;
}

char* FirstSteps::find(c10::TensorImpl& state) {
  const auto found = counts_.find(&state);
  // Another tensor may be where a dead one was.
  return found == counts_.end() || found->second.state.expired() ? nullptr : found->second.at;
}

void FirstSteps::use(Device& device) {
  if (device.stream() == stream_) return;
  const c10::DataPtr* last = nullptr;  // most are in the same memory
  for (const auto& entry : counts_) {
    const c10::DataPtr* memory = entry.second.memory.get();
    if (std::exchange(last, memory) != memory) device.used(*memory);
  }
  stream_ = device.stream();
}

void FirstSteps::forget_the_dead() {
  std::erase_if(counts_, [](const auto& entry) { return entry.second.state.expired(); });
  worth_forgetting_ = 2 * counts_.size() + 64;
}

// --- one device ---------------------------------------------------------------------------------

DeviceWork::DeviceWork(std::unique_ptr<Device> device)
    : plan(plain_on(device->tensors()), *c10::GetAllocator(device->tensors().type())),
      engine_(std::move(device)) {}

// As with the engine's own memory: a graph may go on counting.
DeviceWork::~DeviceWork() {
  static auto& kept = *new std::vector<FirstSteps>;
  if (engine_.ever_captured()) kept.push_back(std::move(first_steps));
}

void DeviceWork::begin() {
  plan.begin();
  hypers_.clear();
  made_.clear();
  first_.clear();
}

std::int32_t DeviceWork::row_of(const Rule& rule, const GroupOptions& options) {
  const auto same = [&](const Made& other) { return other.options == options; };
  if (const Made* made = find_recent(made_, same)) return made->row;
  Hypers hypers{};  // to the last byte, as they are compared by bytes
  for (int i = 0; i < rule.hyper_count; ++i) {
    const Number& number = options.hypers[i];
    const bool single = number.tensor_dtype() == static_cast<std::int64_t>(at::kFloat);
    const bool wide = number.tensor_dtype() == static_cast<std::int64_t>(at::kDouble);
    if (number.is_tensor() && !single && !wide) return -1;
    if (number.is_there()) {
      hypers.cell[i].address = number.address();
      hypers.kind[i] = single ? Hypers::kFloatAt : Hypers::kDoubleAt;
    } else {
      hypers.cell[i].value = number.value;
      hypers.kind[i] = single ? Hypers::kFloat : wide ? Hypers::kDouble : Hypers::kPython;
    }
  }
  hypers.maximize = options.maximize;
  const auto row = static_cast<std::int32_t>(hypers_.size());
  hypers_.push_back(hypers);
  made_.push_back({options, row});
  return row;
}

void DeviceWork::prepare(const Scaling& scaling, const Around& around, const Measuring& measuring,
                         std::int64_t* averaged) {
  first_steps.use(engine_.device());
  const auto counted = plan.counters().kept();
  engine_.prepare({plan.spans(), plan.runs(), hypers_,
                   counted.empty() ? std::span<const Counters::Counter>(first_) : counted,
                   scaling.scale_at, scaling.found_inf_at, around, measuring, averaged});
}

void DeviceWork::launch() {
  plan.bump_versions();
  engine_.launch();
}

at::Tensor DeviceWork::norm(bool is_double) {
  if (engine_.standing() == nullptr) return {};
  device().begin();  // after the last step, and before the next one, on whatever streams these are
  engine_.use_standing();
  const at::TensorOptions there = at::device(device().tensors());
  const at::Tensor seen = at::from_blob(&engine_.standing()->norm, {}, there.dtype(at::kDouble));
  at::Tensor norm = seen.to(is_double ? at::kDouble : at::kFloat, /*non_blocking=*/false,
                            /*copy=*/true);
  device().end();
  return norm;
}

const std::int64_t* DeviceWork::skipped() const {
  return engine_.standing() == nullptr ? nullptr : &engine_.standing()->skipped;
}

// --- all devices --------------------------------------------------------------------------------

std::vector<DeviceWork*> Devices::needed() const {
  std::vector<DeviceWork*> needed;
  for (const auto& work : works_) {
    if (!work->plan.empty()) needed.push_back(work.get());
  }
  return needed;
}

DeviceWork* Devices::find(const c10::TensorImpl& tensor) {
  const c10::Device device = tensor.device();
  for (const auto& work : works_) {
    if (work->device().tensors() == device && (emulates || !device.is_cpu())) return work.get();
  }
  auto made = device_for(device);
  if (made == nullptr) return nullptr;
  works_.push_back(std::make_unique<DeviceWork>(std::move(made)));
  works_.back()->begin();
  return works_.back().get();
}

}  // namespace fastsgd::cuda
