// The devices other than the CPU that an optimizer's parameters lie on, and its work on each.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "counters.h"
#include "cuda/engine.h"
#include "options.h"
#include "plan.h"

namespace fastsgd::cuda {

// Whether this build has kernels that run on a device, the CPU among them.
bool has_kernels_for(c10::Device device);

// Whether a parameter has taken its first step, for rules that count none: only the device knows,
// as a step may be skipped there, or recorded and run later. So there is a count of steps, beside
// the state that the first step makes, and for as long as that lives.
class FirstSteps {
 public:
  // The count for a parameter whose first step makes `state`.
  char* begin(Device& device, const at::Tensor& state);
  // The count for one with this state; null if it was not begun here, and its first step is past.
  char* find(c10::TensorImpl& state);
  // Says that the device's stream uses the counts, if it is another than before.
  void use(Device& device);

 private:
  struct Count {
    c10::weak_intrusive_ptr<c10::TensorImpl> state;
    std::shared_ptr<c10::DataPtr> memory;
    char* at;
  };
  void forget_the_dead();

  std::unordered_map<c10::TensorImpl*, Count> counts_;
  std::size_t worth_forgetting_ = 64;
  std::shared_ptr<c10::DataPtr> memory_;  // of the next counts
  std::size_t used_ = 0;
  std::optional<std::int64_t> stream_;  // that used all of them last
};

// The work of a step on one device.
class DeviceWork {
 public:
  explicit DeviceWork(std::unique_ptr<Device> device);
  ~DeviceWork();

  Plan plan;
  FirstSteps first_steps;

  void begin();
  Device& device() { return engine_.device(); }

  // The number by which an Update names the options of a group; -1 where one is a tensor of a dtype
  // that the device does not compute in. Groups with equal options share a row.
  std::int32_t row_of(const Rule& rule, const GroupOptions& options);
  // Notes, for the parameter added last by a rule that counts no steps, where its first is told.
  void note_first_step(char* count) { first_.push_back({nullptr, nullptr, count, false}); }

  // Brings the device what it needs. May throw; nothing is written yet.
  void prepare(const Scaling& scaling = {}, const Around& around = {},
               const Measuring& measuring = {}, std::int64_t* averaged = nullptr);
  // Writes: versions, then what was prepared.
  void launch();

  // What the device has found out in its last step with a norm, as a new tensor there; undefined
  // before the first. And where the device keeps how many steps it has skipped; null before any.
  at::Tensor norm(bool is_double);
  const std::int64_t* skipped() const;
  // Whether a step of its was ever captured, and may so have been repeated since.
  bool captured() const { return engine_.ever_captured(); }

 private:
  struct Made {
    GroupOptions options;
    std::int32_t row;
  };

  Engine engine_;
  std::vector<Hypers> hypers_;
  std::vector<Made> made_;
  std::vector<Counters::Counter> first_;  // one a run
};

class Devices {
 public:
  // The work on the device where a tensor lies; null where that is the CPU, or a device for which
  // there are no kernels.
  DeviceWork* find(const c10::TensorImpl& tensor);

  // Those with anything to do.
  std::vector<DeviceWork*> needed() const;
  // All works of this step.
  const std::vector<std::unique_ptr<DeviceWork>>& all() const { return works_; }

 private:
  std::vector<std::unique_ptr<DeviceWork>> works_;
};

}  // namespace fastsgd::cuda
