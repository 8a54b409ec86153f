// The part of the walk that plans the first step of a parameter, for which states are made.
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>

#include "modes.h"
#include "pytensor.h"
#include "walk.h"

namespace fastsgd {

Birth Walker::birth(const Group& group) const {
  return {rule_.new_state, fill_value_, group.options.maximize,
          rule_.adds_param(group.options.hypers)};
}

// The states of a shard are distributed tensors, and making those runs Python code: that is done
// between two walks.
bool Walker::plan_first_shard(Place place, Group& group, Subject& subject, const Path& path,
                              Shards::Seen& seen) {
  PyObject* param = path.states.param;
  const auto* all_made = shards_.made_for(param, update_with(group, 0), birth(group));
  if (all_made == nullptr) return false;
  std::vector<at::Tensor> made = *all_made;
  PyObject* streams[kMaxStreams] = {param, path.grad_object};
  for (std::size_t i = 0; i < made.size(); ++i) {
    const std::size_t s = static_cast<std::size_t>(kState) + i;
    if (subject.tensor[s] != nullptr) made[i] = at::Tensor();  // it is there
    streams[s] =
        made[i].defined() ? object_of(*made[i].unsafeGetTensorImpl()) : path.states.value[i];
  }
  if (!shards_.look(streams, subject.streams, seen)) return false;
  c10::TensorImpl* wholes[kMaxStreams];
  for (int s = kParam; s < subject.streams; ++s) {
    wholes[s] = impl_of(streams[s]);
    subject.tensor[s] = LocalShards::memory(streams[s]);
  }
  has_shards_ = true;
  return plan_first(place, group, subject, wholes, path.states, {}, made);
}

// Makes the states, but for those that were made before, and the counter.
bool Walker::plan_first(Place place, Group& group, Subject& subject, Owners owners,
                        const StatesSeen& seen, const Birth& birth,
                        const std::vector<at::Tensor>& made) {
  Creation& creation = states_.create(seen, group.structure);
  std::copy(made.begin(), made.end(), creation.value);
  if (auto* work = devices_.find(*subject.tensor[kParam])) {
    if (plan_first_on_device(*work, group, place, subject, owners, creation, birth)) return true;
    states_.create_no_more();
    return false;
  }
  Moment moment;
  moment.first = !rule_.counts && makes_rules_states(group, subject, creation);
  if (rule_.counts) {
    c10::TensorImpl*& counter = subject.tensor[subject.streams];
    if (counter == nullptr) {
      if (default_device_is_another()) {  // where torch keeps the counter
        states_.create_no_more();
        return false;
      }
      const at::Tensor made_now = new_counter(group.dict, at::kCPU);
      creation.value[subject.streams - kState] = made_now;
      counter = made_now.unsafeGetTensorImpl();
    }
    // One made in inference mode cannot be read: torch knows when it may be written.
    if (!plan_.counters().read(*counter, moment.step)) {
      states_.create_no_more();
      return false;
    }
  }
  const Update& update = find_update(group, moment);
  if (!plan_.add_creating(update, place, subject, owners, birth, creation.value)) {
    states_.create_no_more();
    return false;
  }
  if (rule_.counts) plan_.counters().keep();
  return true;
}

// Whether a parameter lacks more than its average, or lacked it until a walk before this one.
bool Walker::makes_rules_states(const Group& group, const Subject& subject,
                                const Creation& creation) const {
  for (int i = 0; i < subject.streams - kState; ++i) {
    if (i == rule_.structures[group.structure].average) continue;
    if (subject.tensor[kState + i] == nullptr || creation.value[i].defined()) return true;
  }
  return false;
}

bool Walker::plan_first_on_device(cuda::DeviceWork& work, Group& group, Place place,
                                  Subject& subject, Owners owners, Creation& creation,
                                  const Birth& birth) {
  TORCH_CHECK(!work.device().captures(), at_place(place),
              ": this step makes its states, and a graph is being captured, which would make them "
              "anew whenever it is replayed. Take one step before the capture.");
  if (rule_.counts) {
    c10::TensorImpl*& counter = subject.tensor[subject.streams];
    if (counter == nullptr || !work.plan.counters().note(*counter)) {
      at::Tensor& made = creation.value[subject.streams - kState];
      made = counter == nullptr ? new_counter(group.dict, work.device().tensors())
                                : counter_on(work, place, *counter);
      if (!made.defined()) return false;
      counter = made.unsafeGetTensorImpl();
      if (!work.plan.counters().note(*counter)) return false;
    }
  }
  const bool begins = !rule_.counts && makes_rules_states(group, subject, creation);
  const Update& update = update_on(work, group);
  if (update.row < 0 ||
      !work.plan.add_creating(update, place, subject, owners, birth, creation.value)) {
    return false;
  }
  if (rule_.counts) {
    work.plan.counters().keep();
  } else if (begins) {
    // The device may skip the step that would write it, or do it later.
    tensor_of(*subject.tensor[kState]).zero_();
    work.note_first_step(work.first_steps.begin(work.device(), creation.value[0]));
  } else {  // all but its average were there
    work.note_first_step(work.first_steps.find(*owners[kState]));
  }
  return true;
}

// A copy of a counter that is on the CPU, where stock's default path keeps it, and so do its
// checkpoints. Undefined where that is not what keeps the device from counting on it.
at::Tensor Walker::counter_on(cuda::DeviceWork& work, Place place, c10::TensorImpl& counter) const {
  check_counter(place, counter);
  if (plain().type_of(counter) > 1) return {};
  TORCH_CHECK(!work.device().captures(), at_place(place),
              ": its state 'step' is on the CPU, from where the first step brings it to the "
              "device, and a graph is being captured. Take one step before the capture.");
  return tensor_of(counter).to(work.device().tensors(), /*non_blocking=*/true);
}

// Stock keeps counters in float64 where that is the default dtype. Undefined where only stock can
// tell.
at::Tensor Walker::new_counter(PyObject* group, c10::Device device) {
  PyObject* option = fused_.optional_in(group);
  bool fused = false;
  if (option != nullptr && !read_flag(option, fused)) return {};
  const bool is_double = c10::get_default_dtype_as_scalartype() == at::kDouble && !fused;
  return at::scalar_tensor(0, at::device(device).dtype(is_double ? at::kDouble : at::kFloat));
}

}  // namespace fastsgd
