// The part of the walk that plans the parameters of one group.
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "lookahead.h"
#include "prefetch.h"
#include "pytensor.h"
#include "recent.h"
#include "walk.h"

namespace fastsgd {
namespace {

// The objects on the way to a parameter's tensors are fetched so far ahead, as the tensors are read
// through them kAhead parameters ahead.
constexpr std::size_t kFar = 2 * kAhead;

}  // namespace

// --- updates ------------------------------------------------------------------------------------

// The update of parameters of a group at a moment, which may be another's of this step: groups
// whose options are equal share it, and the kernels then take their parameters together.
const Update& Walker::find_update(Group& group, const Moment& moment) {
  group.moment = moment;
  const Made* made = find_recent(made_, [&](const Made& other) {
    return other.moment == moment && other.options == group.options;
  });
  if (made != nullptr) return group.update = made->update;
  group.update = make_update(group, moment);
  made_.push_back({group.options, moment, group.update});
  return group.update;
}

Update Walker::make_update(const Group& group, const Moment& moment) {
  Row row;
  const double greatest = rule_.scalars(group.options.hypers, moment, row);
  row.maximize = group.options.maximize;
  return update_with(group, plan_.add_row(row), greatest);
}

Update Walker::update_with(const Group& group, std::int32_t row, double greatest) const {
  const std::uint8_t storages = storages_that_hold(greatest);
  return {.structure = &rule_.structures[group.structure],
          .kernel = first_kernel(rule_number_, group.options.structure),
          .row = row,
          .writes_grad = extras_->any ? clears_in_pass_ : scaling_.unscale,
          .adds_param = rule_.adds_param(group.options.hypers),
          .wide = extras_->wide,
          .storages = storages,
          .usual = static_cast<std::uint8_t>(extras_->wide ? storages & ~kHalfStorages : storages)};
}

// On another device: where the steps are counted there, one update is good for any moment.
const Update& Walker::update_on(cuda::DeviceWork& work, Group& group) {
  if (group.work != &work) {
    const Number* hypers = group.options.hypers;
    double greatest = 0;  // of what is known here
    for (int i = 0; i < rule_.hyper_count; ++i) {
      if (!hypers[i].is_there()) greatest = std::max(greatest, finite_magnitude(hypers[i].value));
    }
    group.update_there = update_with(group, work.row_of(rule_, group.options), greatest);
    group.work = &work;
  }
  return group.update_there;
}

// --- one parameter ------------------------------------------------------------------------------

template <int kValues>
FASTSGD_PREFETCHING void Walker::fetch(const Path& path) {
  prefetch(path.param);
  prefetch(path.grad_slot);
  prefetch(path.grad_object);
  if constexpr (kValues > 0) {
    prefetch<sizeof(PyDictObject)>(path.states.states);
    for (int i = 0; i < kValues; ++i) prefetch(path.states.value[i]);
  }
}

template <class Kind, int kStates, bool kCounts>
bool Walker::plan_param(Group& group, Py_ssize_t index, PyObject* param, Path& path,
                        [[maybe_unused]] Shards::Seen* seen) {
  constexpr bool kDistributed = std::is_same_v<Kind, LocalShards>;
  constexpr int kStreams = kState + kStates;
  const auto place = [&] { return Place{group.number, index}; };
  c10::TensorImpl* tensor = impl_of(param);
  const at::Tensor* grad = grad_slot(*tensor);
  if (grad == nullptr || !grad->defined()) [[unlikely]]
    return !extras_->averages || plan_average(place(), param);
  if (!group.options.usual()) [[unlikely]] {
    if (!group.options.readable) options_.refuse(place(), group.dict, param);
    if (!group.options.readable || (group.options.promotes && tensor->dim() == 0)) return false;
    const auto& there = group.options.device;
    if (there && (tensor->device() != *there || devices_.find(*tensor) == nullptr)) return false;
  }
  c10::TensorImpl* grad_tensor = grad->unsafeGetTensorImpl();
  PyObject* grad_object = object_of(*grad_tensor);
  if (path.grad != grad_tensor) meets_new_grads_ = true;
  path.param = param;
  path.grad_slot = grad;
  path.grad = grad_tensor;
  path.grad_object = grad_object;
  Subject subject;
  subject.streams = kStreams;
  if constexpr (kDistributed) {
    if (!Kind::has_plain(param) || grad_object == nullptr || !Kind::is(grad_object)) return false;
    subject.tensor[kParam] = Kind::memory(param);
    subject.tensor[kGrad] = Kind::memory(grad_object);
  } else {
    if (grad_object != nullptr && !Kind::is(grad_object)) [[unlikely]]
      return false;
    subject.tensor[kParam] = tensor;
    subject.tensor[kGrad] = grad_tensor;
  }
  if (looks_before_clearing_ && !zeros_clear(*grad_tensor, *subject.tensor[kGrad]) &&
      !look_before_clearing(place(), *grad, *subject.tensor[kGrad])) [[unlikely]] {
    return true;
  }
  if constexpr (kStates + kCounts > 0) {
    const int structure = group.structure;
    c10::TensorImpl** states = subject.tensor + kState;
    if (!states_.recall<Kind, kStates, kCounts>(param, structure, path.states, states))
        [[unlikely]] {
      const auto found = states_.find<Kind>(place(), param, structure, path.states, states);
      if (found == States::Found::kForeign) return false;
      if (found == States::Found::kSome) {
        if constexpr (kDistributed) return plan_first_shard(place(), group, subject, path, *seen);
        return plan_first(place(), group, subject, subject.tensor, path.states, birth(group), {});
      }
    }
  }
  Owners owners = subject.tensor;
  [[maybe_unused]] c10::TensorImpl* wholes[kStreams];
  if constexpr (kDistributed) {
    PyObject* streams[kStreams] = {param, grad_object};
    std::copy_n(path.states.value, kStates, streams + kState);
    if (!shards_.alike(streams, *seen)) return false;
    wholes[kParam] = tensor;
    wholes[kGrad] = grad_tensor;
    for (int s = kState; s < kStreams; ++s) wholes[s] = impl_of(streams[s]);
    owners = wholes;
    has_shards_ = true;
  }
  if (Fields::keys(*subject.tensor[kParam]) != cpu_keys_) [[unlikely]] {
    if (auto* work = devices_.find(*subject.tensor[kParam])) {
      return plan_on_device<kStates, kCounts>(*work, group, place(), subject, owners, path.states);
    }
  }
  Moment moment;
  if constexpr (kCounts) {
    c10::TensorImpl& counter = *subject.tensor[kStreams];
    if (!plan_.counters().read(counter, moment.step)) [[unlikely]] {
      check_counter(place(), counter);
      return false;
    }
  }
  if (!plan_.add<kStates>(update_of<kCounts>(group, moment), place(), subject, owners))
    return false;
  if constexpr (kCounts) plan_.counters().keep();
  return true;
}

// What there is to clearing a gradient but zeros in the pass: one in a graph is detached from it
// afterwards, and one whose elements share memory is zeroed afterwards, as it is still read when
// the first of them have been stepped: then the walk is repeated without zeros in the pass, and
// planning on is of no use, which is false. Throws where clearing would, after the step.
bool Walker::look_before_clearing(Place place, const at::Tensor& grad,
                                  const c10::TensorImpl& memory) {
  const std::string why = why_not_zeroed(grad);
  TORCH_CHECK(why.empty(), at_place(place), ": its grad ", why,
              ": set clear_grads to True instead.");
  if (!clears_in_pass_) return !walks_again_;
  if (grad.requires_grad()) in_graphs_.push_back(grad);
  if (is_expanded(memory)) {
    clears_in_pass_ = false;
    walks_again_ = true;
  }
  return !walks_again_;
}

// One that is not stepped, as it has no gradient, but may have an average.
bool Walker::plan_average(Place place, PyObject* param) {
  static constexpr Structure kBoth{.before_states = {"its state 'ema'", "its data"}};
  PyObject* average = states_.average_of(param);
  if (average == nullptr) return true;
  if (!exact_tensor(param) || !exact_tensor(average)) return false;
  const Subject subject{{impl_of(average), impl_of(param)}, 2};
  if (Fields::keys(*impl_of(param)) != cpu_keys_) {
    auto* work = devices_.find(*impl_of(param));
    return work != nullptr && work->plan.add_average({&kBoth, kAverage, 0}, place, subject);
  }
  if (average_row_ < 0) average_row_ = plan_.add_row({});
  return plan_.add_average({&kBoth, kAverage, average_row_}, place, subject);
}

template <int kStates, bool kCounts>
bool Walker::plan_on_device(cuda::DeviceWork& work, Group& group, Place place, Subject& subject,
                            Owners owners, const StatesSeen& seen) {
  if constexpr (kCounts) {
    c10::TensorImpl*& counter = subject.tensor[kState + kStates];
    if (!work.plan.counters().note(*counter)) {
      at::Tensor there = counter_on(work, place, *counter);
      if (!there.defined()) return false;
      counter = there.unsafeGetTensorImpl();
      states_.create(seen, group.structure).value[kStates] = std::move(there);
      if (plan_on_device<kStates, kCounts>(work, group, place, subject, owners, seen)) return true;
      states_.create_no_more();
      return false;
    }
  }
  const Update& update = update_on(work, group);
  if (update.row < 0 || !work.plan.add<kStates>(update, place, subject, owners)) return false;
  if constexpr (kCounts) {
    work.plan.counters().keep();
  } else {
    work.note_first_step(kStates == 0 ? nullptr : work.first_steps.find(*owners[kState]));
  }
  return true;
}

// Parameters that are distributed over processes, of which this one holds shards, from the
// `index`th on: returns the index of the next that is not.
template <int kStates, bool kCounts>
[[gnu::flatten]] Py_ssize_t Walker::plan_shards(Group& group, Py_ssize_t index,
                                                std::size_t number) {
  PyObject* params = group.options.params;
  for (; index < PyList_GET_SIZE(params); ++index, ++number) {
    PyObject* param = PyList_GET_ITEM(params, index);
    if (!LocalShards::is_distributed(param)) break;
    Path* path = &paths_[number];
    Shards::Seen* seen = &shards_seen_[number];
    const Path& far = path[kFar];
    fetch<kStates + (kCounts ? 1 : 0)>(far);
    LocalShards::fetch(far.param);
    LocalShards::fetch(far.grad_object);
    for (int i = 0; i < kStates; ++i) LocalShards::fetch(far.states.value[i]);
    Shards::fetch<kState + kStates>(seen[kAhead]);
    prefetch<kHeadBytes>(path[kAhead].grad);
    plan_.fetch_owners<kStates>();
    if (!plan_param<LocalShards, kStates, kCounts>(group, index, param, *path, seen)) [[unlikely]]
      leave_to_stock({group.number, index}, param);
  }
  return index;
}

// --- all parameters of a group ------------------------------------------------------------------

// Flat: GCC would call torch's accessors, each of them a few instructions, for their slow paths.
template <int kStates, bool kCounts>
[[gnu::flatten]] void Walker::plan_params(Group& group, std::size_t& number) {
  PyObject* params = group.options.params;
  const std::size_t needed = number + static_cast<std::size_t>(PyList_GET_SIZE(params)) + kFar;
  if (paths_.size() < needed) paths_.resize(needed);
  if (LocalShards::are_known() && shards_seen_.size() < needed) shards_seen_.resize(needed);
  const bool looks_ahead = met_new_grads_, any_apart = !apart_.empty();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++number) {
    Path* path = &paths_[number];
    fetch<kStates + (kCounts ? 1 : 0)>(path[kFar]);
    if (looks_ahead) {
      const Lookahead ahead(params, i);
      ahead.fetch_grad(kAhead);
      ahead.fetch_grad_storage(kAhead / 2);
    }
    PyObject* param = PyList_GET_ITEM(params, i);
    bool planned;
    if (any_apart && is_apart({group.number, i})) [[unlikely]] {
      planned = false;
    } else if (exact_tensor(param)) [[likely]] {
      planned = plan_param<PlainTensors, kStates, kCounts>(group, i, param, *path, nullptr);
    } else if (LocalShards::is_distributed(param)) {
      const Py_ssize_t last = plan_shards<kStates, kCounts>(group, i, number) - 1;
      number += static_cast<std::size_t>(last - i);
      i = last;
      continue;
    } else {
      planned = !strangers_.has_grad(param) &&
                !(extras_->averages && states_.average_of(param) != nullptr);
    }
    if (!planned) [[unlikely]]
      leave_to_stock({group.number, i}, param);
  }
}

template <bool kCounts, int... kStates>
void Walker::plan_params(Group& group, std::size_t& number, int states,
                         std::integer_sequence<int, kStates...>) {
  static_cast<void>(
      ((states == kStates && (plan_params<kStates, kCounts>(group, number), true)) || ...));
}

void Walker::plan_group(Group& group, std::size_t& number) {
  constexpr std::make_integer_sequence<int, kMaxStates + 1> kCases;
  const int states = rule_.structures[group.structure].count;
  if (rule_.counts) {
    plan_params<true>(group, number, states, kCases);
  } else {
    plan_params<false>(group, number, states, kCases);
  }
}

}  // namespace fastsgd
