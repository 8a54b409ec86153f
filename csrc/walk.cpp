#include "walk.h"

#include <ATen/ops/scalar_tensor.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>
#include <type_traits>

#include "lookahead.h"
#include "prefetch.h"
#include "pytensor.h"
#include "rules/table.h"

namespace fastsgd {
namespace {

constexpr std::size_t kFar = 2 * kAhead;

// The global hooks: dictionaries that torch changes in place.
bool any_global_hook() {
  static PyObject* const hooks[] = {
      PyObject_GetAttrString(Ref::steal(PyImport_ImportModule("torch.optim.optimizer")).get(),
                             "_global_optimizer_pre_hooks"),
      PyObject_GetAttrString(Ref::steal(PyImport_ImportModule("torch.optim.optimizer")).get(),
                             "_global_optimizer_post_hooks")};
  return PyDict_Size(checked(hooks[0])) != 0 || PyDict_Size(checked(hooks[1])) != 0;
}

}  // namespace

PyObject* attributes_of(PyObject* object) {
  const Ref dict = Ref::steal(checked(PyObject_GenericGetDict(object, nullptr)));
  return dict.get();
}

bool exact_dict(PyObject* object) {
  return PyDict_CheckExact(object) || PyODict_CheckExact(object);
}

Walker::Walker(int rule)
    : rule_(rule_at(rule)),
      rule_number_(rule),
      options_(rule_),
      states_(rule_),
      fill_(rule_.fill == nullptr ? "" : rule_.fill) {}

bool Walker::unobserved(PyObject* optimizer) {
  if (at::hasCallbacks() || any_global_hook()) return false;
  PyObject* attributes = attributes_of(optimizer);
  PyObject* pre = pre_hooks_.optional_in(attributes);
  PyObject* post = post_hooks_.optional_in(attributes);
  return pre != nullptr && post != nullptr && PyDict_Size(pre) == 0 && PyDict_Size(post) == 0;
}

// --- updates ------------------------------------------------------------------------------------

// The update of parameters of a group at a moment, which may be another's of this step: groups
// whose options are equal share it, and the kernels then take their parameters together.
const Update& Walker::find_update(Group& group, const Moment& moment) {
  constexpr std::size_t kLooks = 8;  // a bound on the time this takes where no two are equal
  group.moment = moment;
  const std::size_t begin = made_.size() - std::min(made_.size(), kLooks);
  for (std::size_t i = made_.size(); i-- > begin;) {
    if (made_[i].moment == moment && made_[i].options == group.options) {
      return group.update = made_[i].update;
    }
  }
  group.update = make_update(group.options, moment);
  made_.push_back({group.options, moment, group.update});
  return group.update;
}

Update Walker::make_update(const GroupOptions& options, const Moment& moment) {
  Row row;
  rule_.scalars(options.hypers, moment, row);
  row.grad_scale = scaling_.scale;
  row.unscale = scaling_.unscale;
  row.maximize = options.maximize;
  return {&rule_.structures[options.structure],
          kernels().step[rule_number_][options.structure],
          plan_.add_row(row),
          scaling_.unscale,
          options.maximize,
          rule_.new_state(options.hypers),
          fill_value_};
}

// --- one parameter ------------------------------------------------------------------------------

template <int kValues>
FASTSGD_PREFETCHING void Walker::fetch(const Path& path) const {
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
  const auto place = [&] { return Place{group.number, index}; };
  c10::TensorImpl* tensor = impl_of(param);
  const at::Tensor* grad = grad_slot(*tensor);
  if (grad == nullptr || !grad->defined()) [[unlikely]]
    return true;
  if (!group.options.readable) [[unlikely]] {
    options_.refuse(place(), group.dict, param);
    return false;
  }
  c10::TensorImpl* grad_tensor = grad->unsafeGetTensorImpl();
  PyObject* grad_object = object_of(*grad_tensor);
  if (path.grad != grad_tensor) new_grads_ = true;
  path.param = param;
  path.grad_slot = grad;
  path.grad = grad_tensor;
  path.grad_object = grad_object;
  Subject subject;
  subject.streams = kState + kStates;
  if constexpr (kDistributed) {
    if (!Kind::is(param) || grad_object == nullptr || !Kind::is(grad_object)) return false;
    subject.tensor[kParam] = Kind::memory(param);
    subject.tensor[kGrad] = Kind::memory(grad_object);
  } else {
    if (grad_object != nullptr && !Kind::is(grad_object)) [[unlikely]]
      return false;
    subject.tensor[kParam] = tensor;
    subject.tensor[kGrad] = grad_tensor;
  }
  if constexpr (kStates + kCounts > 0) {
    const int structure = group.options.structure;
    c10::TensorImpl** states = subject.tensor + kState;
    if (!states_.recall<Kind, kStates, kCounts>(param, structure, path.states, states))
        [[unlikely]] {
      const auto found = states_.find<Kind>(place(), param, structure, path.states, states);
      if (found == States::Found::kForeign) return false;
      if (found == States::Found::kSome) {
        if constexpr (kDistributed) return plan_first_shard(place(), group, subject, path, *seen);
        return plan_first(place(), group, subject, path.states, {});
      }
    }
  }
  if constexpr (kDistributed) {
    PyObject* streams[kState + kStates] = {param, grad_object};
    std::copy_n(path.states.value, kStates, streams + kState);
    if (!shards_.alike(streams, *seen)) return false;
  }
  Moment moment;
  if constexpr (kCounts) {
    c10::TensorImpl& counter = *subject.tensor[kState + kStates];
    if (!plan_.counters().read(counter, moment.step)) [[unlikely]] {
      check_counter(place(), counter);
      return false;
    }
  }
  const std::size_t size = plan_.size();
  if (!plan_.add<kStates>(update_of(group, moment), place(), subject)) return false;
  if constexpr (kCounts) plan_.counters().keep();
  if constexpr (kDistributed) {
    PyObject* streams[kState + kStates] = {param, grad_object};
    std::copy_n(path.states.value, kStates, streams + kState);
    stand_for(subject, streams, size);
  }
  return true;
}

// A parameter that is distributed over processes, of which this one holds a shard.
template <int kStates, bool kCounts>
bool Walker::plan_shard(Group& group, Py_ssize_t index, PyObject* param, std::size_t number) {
  if (shards_seen_.size() < paths_.size()) shards_seen_.resize(paths_.size());
  Shards::fetch(shards_seen_[number + kAhead]);
  return plan_param<LocalShards, kStates, kCounts>(group, index, param, paths_[number],
                                                   &shards_seen_[number]);
}

// Writes to shards count as writes to the tensors that they are shards of.
void Walker::stand_for(const Subject& shards, PyObject* const* streams, std::size_t size_before) {
  if (plan_.size() == size_before) return;  // an empty shard
  Subject owners;
  owners.streams = shards.streams;
  for (int s = 0; s < shards.streams; ++s) owners.tensor[s] = impl_of(streams[s]);
  plan_.stand_for(owners);
}

// The first step of a shard. Its states are distributed tensors, and making those runs Python code:
// that is done between two walks.
bool Walker::plan_first_shard(Place place, Group& group, Subject& subject, const Path& path,
                              Shards::Seen& seen) {
  PyObject* param = path.states.param;
  const auto* made = shards_.made_for(param, rule_.structures[group.options.structure],
                                      rule_.new_state(group.options.hypers), fill_value_);
  if (made == nullptr) return false;
  PyObject* streams[kMaxStreams] = {param, path.grad_object};
  for (std::size_t i = 0; i < made->size(); ++i) {
    streams[static_cast<std::size_t>(kState) + i] = object_of(*(*made)[i].unsafeGetTensorImpl());
  }
  seen.count = subject.streams;
  for (int s = 0; s < subject.streams; ++s) seen.spec[s] = LocalShards::spec(streams[s]);
  if (!shards_.alike(seen)) return false;
  for (int s = kState; s < subject.streams; ++s) {
    subject.tensor[s] = LocalShards::memory(streams[s]);
  }
  const std::size_t size = plan_.size();
  if (!plan_first(place, group, subject, path.states, *made)) return false;
  stand_for(subject, streams, size);
  return true;
}

// The first step of a parameter, which makes its states, but for those that were made for it.
bool Walker::plan_first(Place place, Group& group, Subject& subject, const StatesSeen& seen,
                        const std::vector<at::Tensor>& made) {
  Creation& creation = states_.create(seen, group.options.structure);
  std::copy(made.begin(), made.end(), creation.value);
  Moment moment;
  moment.first = !rule_.counts;
  if (rule_.counts) {
    at::Tensor& counter = creation.value[subject.streams - kState] = new_counter(group.dict);
    // One made in inference mode cannot be read: torch knows when it may be written.
    if (!counter.defined() || !plan_.counters().read(*counter.unsafeGetTensorImpl(), moment.step)) {
      states_.create_no_more();
      return false;
    }
  }
  if (!plan_.add_creating(update_of(group, moment), place, subject, creation.value)) {
    states_.create_no_more();
    return false;
  }
  if (rule_.counts) plan_.counters().keep();
  return true;
}

// Stock keeps counters on the CPU, in float64 where that is the default dtype. Undefined where only
// stock can tell.
at::Tensor Walker::new_counter(PyObject* group) {
  PyObject* option = fused_.optional_in(group);
  bool fused = false;
  if (option != nullptr && !read_flag(option, fused)) return {};
  const bool is_double = c10::get_default_dtype_as_scalartype() == at::kDouble && !fused;
  return at::scalar_tensor(0, is_double ? at::kDouble : at::kFloat);
}

// --- the step -----------------------------------------------------------------------------------

template <int kStates, bool kCounts>
void Walker::plan_params(Group& group, std::size_t& number) {
  PyObject* params = group.options.params;
  const std::size_t needed = number + static_cast<std::size_t>(PyList_GET_SIZE(params)) + kFar;
  if (paths_.size() < needed) paths_.resize(needed);
  Path* path = &paths_[number];
  const bool grads_are_new = grads_are_new_;
  Py_ssize_t i = 0;
  for (; i < PyList_GET_SIZE(params); ++i, ++path) {
    fetch<kStates + (kCounts ? 1 : 0)>(path[kFar]);
    if (grads_are_new) {
      const Lookahead ahead(params, i);
      ahead.fetch_grad(kAhead);
      ahead.fetch_grad_storage(kAhead / 2);
    }
    PyObject* param = PyList_GET_ITEM(params, i);
    if (exact_tensor(param)) [[likely]] {
      if (!plan_param<PlainTensors, kStates, kCounts>(group, i, param, *path, nullptr)) {
        leave_to_stock({group.number, i}, param);
      }
      continue;
    }
    if (LocalShards::is_distributed(param)) {
      if (!plan_shard<kStates, kCounts>(group, i, param, number + static_cast<std::size_t>(i))) {
        leave_to_stock({group.number, i}, param);
      }
      continue;
    }
    met_strangers_ = true;
    if (has_grad(param)) leave_to_stock({group.number, i}, param);
  }
  number += static_cast<std::size_t>(i);
}

void Walker::plan_group(Group& group, std::size_t& number) {
  static_assert(kMaxStates == 4);
  switch (rule_.structures[group.options.structure].count + (rule_.counts ? 10 : 0)) {
    case 0:
      return plan_params<0, false>(group, number);
    case 1:
      return plan_params<1, false>(group, number);
    case 2:
      return plan_params<2, false>(group, number);
    case 3:
      return plan_params<3, false>(group, number);
    case 4:
      return plan_params<4, false>(group, number);
    case 10:
      return plan_params<0, true>(group, number);
    case 11:
      return plan_params<1, true>(group, number);
    case 12:
      return plan_params<2, true>(group, number);
    case 13:
      return plan_params<3, true>(group, number);
    default:
      return plan_params<4, true>(group, number);
  }
}

// False where the groups are kept in some way that only stock understands.
bool Walker::plan_groups(PyObject* groups) {
  strangers_met_ = 0;
  made_.clear();
  options_.begin();
  std::size_t number = 0;  // of a parameter, counted over all groups
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* dict = PyList_GET_ITEM(groups, g);
    if (!exact_dict(dict)) return false;
    Group group{dict, g, options_.read(dict, static_cast<std::size_t>(g)), {}, {}};
    if (!PyList_Check(group.options.params)) return false;
    plan_group(group, number);
  }
  return true;
}

// Asks each parameter that is neither plain nor distributed for its gradient.
void Walker::ask_strangers(PyObject* groups) {
  strangers_.clear();
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    const Ref dict = Ref::borrow(PyList_GET_ITEM(groups, g));
    if (!exact_dict(dict.get())) return;
    const Ref params = Ref::borrow(params_.needed_in(dict.get()));
    if (!PyList_Check(params.get())) return;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.get()); ++i) {
      if (exact_tensor(PyList_GET_ITEM(params.get(), i))) continue;
      Ref param = Ref::borrow(PyList_GET_ITEM(params.get(), i));
      LocalShards::learn(param.get());
      if (LocalShards::is_distributed(param.get())) continue;
      const Ref grad = Ref::steal(checked(PyObject_GetAttrString(param.get(), "grad")));
      strangers_.emplace_back(std::move(param), grad.get() != Py_None);
    }
  }
}

// What was answered: in the order of the walk, if nothing has been moved by an answer. One that was
// not asked goes to stock, which asks itself.
bool Walker::has_grad(PyObject* stranger) {
  const auto is = [&](const auto& asked) { return asked.first.get() == stranger; };
  auto asked = strangers_.begin() + static_cast<std::ptrdiff_t>(strangers_met_);
  if (asked == strangers_.end() || !is(*asked)) {
    asked = std::find_if(strangers_.begin(), strangers_.end(), is);
    if (asked == strangers_.end()) return true;
  }
  strangers_met_ = static_cast<std::size_t>(asked - strangers_.begin()) + 1;
  return asked->second;
}

// Walks until nothing is left to ask: no Python code runs within a walk, but between two of them.
bool Walker::plan_all(PyObject* groups, PyObject* state) {
  // One that meets a stranger, one that wants its states, one that meets specs; the fourth steps.
  constexpr int kWalks = 4;
  bool asks = met_strangers_, asked = false;
  for (int walk = 0; walk < kWalks; ++walk) {
    if (asks) ask_strangers(groups);
    asked |= asks;
    if (shards_.asks()) shards_.answer();
    met_strangers_ = false;
    routes_.clear();
    left_.clear();
    states_.clear();
    plan_.begin();
    states_.begin(state);
    if (!plan_groups(groups)) return false;
    asks = met_strangers_ && !asked;
    if (!asks && !shards_.asks()) break;
  }
  return true;
}

bool Walker::all_to_stock() {
  routes_.clear();
  return false;
}

bool Walker::step(PyObject* optimizer) {
  const Busy guard(busy);
  const Cleanup cleanup{*this};
  routes_.clear();
  plan_.begin();
  PyObject* attributes = attributes_of(optimizer);
  const Ref groups_kept = Ref::borrow(param_groups_.optional_in(attributes));
  const Ref state_kept = Ref::borrow(state_.optional_in(attributes));
  PyObject *groups = groups_kept.get(), *state = state_kept.get();
  PyObject* defaults = defaults_.optional_in(attributes);
  if (groups == nullptr || !PyList_Check(groups)) return false;
  if (state == nullptr || !PyDict_Check(state)) return false;
  if (defaults == nullptr || !PyDict_Check(defaults)) return false;
  PyObject* differentiable = differentiable_.optional_in(defaults);
  bool differentiates = false;
  if (differentiable != nullptr && !read_flag(differentiable, differentiates)) return false;
  if (differentiates || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0)) return false;  // tangents move too
  scaling_ = options_.read_scaling(attributes);
  if (!scaling_.readable) return false;
  if (scaling_.skip) return true;
  if (rule_.fill != nullptr) {
    PyObject* fill = fill_.optional_in(defaults);
    if (fill == nullptr || (!PyFloat_Check(fill) && !PyLong_Check(fill))) return false;
    fill_value_ = PyFloat_AsDouble(fill);
    if (fill_value_ == -1 && PyErr_Occurred()) throw python_error();
  }

  grads_are_new_ = std::exchange(new_grads_, false);
  if (!plan_all(groups, state)) return all_to_stock();
  if (!routes_.empty()) {
    routes_.resize(static_cast<std::size_t>(PyList_GET_SIZE(groups)));
  }
  // Duplicates and overlaps run in order. But where stock must take a part, or one parameter is to
  // get its first state twice, or count two steps, or where an option is a tensor (which may lie in
  // a parameter), only stock knows the order: it takes all. So it does where what it takes shares
  // memory with what it does not.
  plan_.note_scalars(options_.tensors());
  if (plan_.ordered() &&
      (!routes_.empty() || states_.creates() || rule_.counts || !options_.tensors().empty())) {
    return all_to_stock();
  }
  if (states_.creates_twice()) return all_to_stock();
  if (!left_.empty() && plan_.meets(left_)) return all_to_stock();
  if (!routes_.empty()) return false;
  if (states_.creates()) {
    plan_.retain();  // storing into a dict may run Python code
    states_.commit();
  }
  plan_.run(true);
  return true;
}

// Notes that stock must take a parameter, and all memory that its step may use.
void Walker::leave_to_stock(Place place, PyObject* param) {
  const auto group = static_cast<std::size_t>(place.group);
  if (routes_.size() <= group) routes_.resize(group + 1);
  routes_[group].push_back(place.index);
  const auto note = [&](c10::TensorImpl* tensor) {
    if (tensor == nullptr) return;
    PyObject* object = object_of(*tensor);
    if (object != nullptr && LocalShards::is(object)) tensor = LocalShards::memory(object);
    if (!tensor->has_storage()) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(tensor->storage().data());
    const std::uintptr_t bytes = tensor->storage().nbytes();
    if (bytes > 0) left_.push_back({begin, begin + bytes});
  };
  if (!THPVariable_Check(param)) return;
  c10::TensorImpl* tensor = impl_of(param);
  note(tensor);
  if (const at::Tensor* grad = grad_slot(*tensor)) {
    TORCH_CHECK(rule_.sparse_error == nullptr || !grad->defined() || !grad->is_sparse(),
                rule_.sparse_error);
    note(grad->unsafeGetTensorImpl());
  }
  PyObject *states = states_.of(param), *name, *state;
  Py_ssize_t position = 0;
  while (states != nullptr && PyDict_Check(states) &&
         PyDict_Next(states, &position, &name, &state)) {
    if (any_tensor(state)) note(impl_of(state));
  }
}

}  // namespace fastsgd
