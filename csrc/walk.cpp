#include "walk.h"

#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "prefetch.h"
#include "rules/table.h"

namespace fastsgd {
namespace {

const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

// A Tensor or a Parameter, and no subclass: one that could mean something else by its data.
bool exact_tensor(PyObject* object) { return THPVariable_CheckExact(object); }

// The Python object of a tensor that C++ holds; null where it has none. Torch 2.11 called it
// otherwise.
template <class Slot>
PyObject* object_in(const Slot& slot) {
  if constexpr (requires { slot.load_pyobj(); }) {
    return slot.load_pyobj();
  } else {
    return slot.check_pyobj().value_or(nullptr);
  }
}

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw python_error();
  return object;
}

// The attributes of an object; the dict stays alive with the object.
PyObject* attributes_of(PyObject* object) {
  const Ref dict = Ref::steal(checked(PyObject_GenericGetDict(object, nullptr)));
  return dict.get();
}

PyObject* value_of(DictKey& key, PyObject* dict) {
  PyObject* value = key.in(dict);
  if (value != nullptr) return value;
  if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key.name());
  throw python_error();
}

PyObject* optional_value_of(DictKey& key, PyObject* dict) {
  PyObject* value = key.in(dict);
  if (value == nullptr && PyErr_Occurred()) throw python_error();
  return value == Py_None ? nullptr : value;
}

// The truth of an object that has no code of its own for it; false is returned for any other
// object.
bool read_flag(PyObject* object, bool& value) {
  if (!PyBool_Check(object) && object != Py_None && !PyLong_CheckExact(object) &&
      !PyFloat_CheckExact(object)) {
    return false;
  }
  value = PyObject_IsTrue(object) != 0;
  return true;
}

// A one-element floating point CPU tensor's value; false for any other object.
bool read_scalar_tensor(PyObject* object, double& value) {
  if (!exact_tensor(object)) return false;
  const at::Tensor& tensor = tensor_of(object);
  if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.numel() != 1 ||
      tensor.requires_grad() || !tensor.is_floating_point() || tensor.is_neg()) {
    return false;
  }
  switch (tensor.scalar_type()) {
    case at::kFloat:
      value = *tensor.const_data_ptr<float>();
      break;
    case at::kDouble:
      value = *tensor.const_data_ptr<double>();
      break;
    default:
      value = tensor.item<double>();
  }
  return true;
}

// The global hooks: dictionaries that torch changes in place.
bool any_global_hook() {
  static PyObject* const hooks[] = {
      PyObject_GetAttrString(Ref::steal(PyImport_ImportModule("torch.optim.optimizer")).get(),
                             "_global_optimizer_pre_hooks"),
      PyObject_GetAttrString(Ref::steal(PyImport_ImportModule("torch.optim.optimizer")).get(),
                             "_global_optimizer_post_hooks")};
  return PyDict_Size(checked(hooks[0])) != 0 || PyDict_Size(checked(hooks[1])) != 0;
}

// Whether a parameter that is no plain tensor has a gradient.
bool has_grad(PyObject* param) {
  return Ref::steal(checked(PyObject_GetAttrString(param, "grad"))).get() != Py_None;
}

// The gradient of a plain tensor; null where it has none.
at::Tensor* grad_of(PyObject* param) {
  const at::Tensor& grad = tensor_of(param).unsafeGetTensorImpl()->grad();
  return grad.defined() ? const_cast<at::Tensor*>(&grad) : nullptr;
}

// Gradients are new at each iteration, so they are found ahead of time as well as fetched: first
// the gradient of a parameter some way off, then the storage of one that is nearer.
FASTSGD_PREFETCHING void fetch_grads_ahead(PyObject* params, Py_ssize_t i) {
  const auto grad_at = [&](Py_ssize_t at) -> at::Tensor* {
    if (at >= PySequence_Fast_GET_SIZE(params)) return nullptr;
    PyObject* param = PySequence_Fast_GET_ITEM(params, at);
    return exact_tensor(param) ? grad_of(param) : nullptr;
  };
  const auto ahead = static_cast<Py_ssize_t>(kAhead);
  if (const at::Tensor* far = grad_at(i + 2 * ahead)) {
    prefetch<sizeof(c10::TensorImpl)>(far->unsafeGetTensorImpl());
  }
  if (const at::Tensor* near = grad_at(i + ahead)) {
    prefetch<sizeof(c10::StorageImpl)>(
        near->unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  }
}

// A group as torch makes it; one of another type may mean something else by its items.
bool exact_dict(PyObject* object) {
  return PyDict_CheckExact(object) || PyODict_CheckExact(object);
}

// Marks the walker busy for as long as it works on a step.
class Busy {
 public:
  explicit Busy(bool& flag) : flag_(flag) { flag_ = true; }
  ~Busy() { flag_ = false; }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  bool& flag_;
};

}  // namespace

Walker::Walker(int rule) : rule_(rule_at(rule)), rule_number_(rule) {
  for (int i = 0; i < rule_.hyper_count; ++i) hyper_keys_.emplace_back(rule_.hypers[i].name);
  const int states = rule_.max_states;
  for (int i = 0; i < states; ++i) state_keys_.emplace_back(rule_.states[i]);
}

bool Walker::unobserved(PyObject* optimizer) {
  if (at::hasCallbacks() || any_global_hook()) return false;
  PyObject* attributes = attributes_of(optimizer);
  PyObject* pre = optional_value_of(pre_hooks_, attributes);
  PyObject* post = optional_value_of(post_hooks_, attributes);
  return pre != nullptr && post != nullptr && PyDict_Size(pre) == 0 && PyDict_Size(post) == 0;
}

// --- options ------------------------------------------------------------------------------------

bool Walker::read_number(PyObject* object, Hyper::Kind kind, Seen& seen, double& value) {
  if (object == seen.object.get()) {
    value = seen.value;
    return true;
  }
  if (kind == Hyper::kFlag) {
    bool flag;
    if (!read_flag(object, flag)) return false;
    value = flag ? 1 : 0;
  } else if (PyFloat_Check(object)) {
    value = PyFloat_AS_DOUBLE(object);
    if (!PyFloat_CheckExact(object)) return true;  // a subclass may hold on to anything
  } else if (PyLong_CheckExact(object)) {
    value = PyLong_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) throw python_error();
  } else {
    return kind == Hyper::kNumberOrTensor && read_scalar_tensor(object, value);
  }
  seen.object = Ref::borrow(object);  // immutable, so the same object is the same value
  seen.value = value;
  return true;
}

void Walker::read_group(PyObject* dict, std::size_t number, Group& group) {
  if (number == groups_.size()) groups_.emplace_back();
  GroupMemory& memory = groups_[number];
  memory.seen.resize(static_cast<std::size_t>(rule_.hyper_count));
  group.dict = dict;
  group.readable = read_flag(value_of(maximize_, dict), group.maximize);
  for (int i = 0; i < rule_.hyper_count; ++i) {
    const std::size_t at = static_cast<std::size_t>(i);
    group.readable &= read_number(value_of(hyper_keys_[at], dict), rule_.hypers[i].kind,
                                  memory.seen[at], group.hypers[i]);
  }
  if (!group.readable) return;
  group.structure = rule_.structure(group.hypers);
  group.states = rule_.state_count(group.structure);
}

// Refuses options that stock's arithmetic would refuse halfway through the step of a parameter.
void Walker::refuse_options(const Place& place, PyObject* group, PyObject* param) {
  for (int i = 0; i < rule_.hyper_count; ++i) {
    if (rule_.hypers[i].kind == Hyper::kFlag) continue;
    const char* name = rule_.hypers[i].name;
    PyObject* option = value_of(hyper_keys_[static_cast<std::size_t>(i)], group);
    if (THPVariable_Check(option)) {
      TORCH_CHECK_VALUE(tensor_of(option).numel() == 1, "param_groups[", place.group, "]['", name,
                        "']: Tensor ", name, " must be 1-element");
    } else {
      TORCH_CHECK_TYPE(PyNumber_Check(option), "param_groups[", place.group, "]['", name,
                       "'] must be a number, not ", Py_TYPE(option)->tp_name);
    }
    TORCH_CHECK(!PyComplex_Check(option) || tensor_of(param).is_complex(), at_place(place),
                ": For non-complex input tensors, argument alpha must not be a complex number.");
  }
}

// What a GradScaler leaves on an optimizer that does its own unscaling; false where it is
// unreadable.
bool Walker::read_scaling(PyObject* attributes, bool& skip) {
  skip = unscale_ = false;
  if (PyObject* found_inf = optional_value_of(found_inf_, attributes)) {
    double found;
    if (!read_scalar_tensor(found_inf, found)) return false;
    skip = found != 0;
  }
  if (PyObject* grad_scale = optional_value_of(grad_scale_, attributes)) {
    if (!read_scalar_tensor(grad_scale, scale_)) return false;
    unscale_ = true;
  }
  return true;
}

const Update& Walker::make_update(Group& group, bool first) {
  Row row;
  rule_.scalars(group.hypers, first, row);
  row.grad_scale = scale_;
  row.unscale = unscale_;
  row.maximize = group.maximize;
  Update& update = group.update[first ? 1 : 0];
  update = {&rule_, kernels().step[rule_number_][group.structure], plan_.add_row(row), unscale_,
            rule_.state_like(group.hypers)};
  return update;
}

// --- the step -----------------------------------------------------------------------------------

bool Walker::plan_param(const Place& place, Group& group, PyObject* param, Path& path) {
  c10::TensorImpl* tensor = tensor_of(param).unsafeGetTensorImpl();
  const at::Tensor& grad = tensor->grad();
  path.grad = &grad;
  if (!grad.defined()) return true;
  if (!group.readable) {
    refuse_options(place, group.dict, param);
    return false;
  }
  PyObject* grad_object = object_in(*grad.unsafeGetTensorImpl()->pyobj_slot());
  path.grad_object = grad_object;
  if (grad_object != nullptr && !exact_tensor(grad_object)) return false;
  Subject subject;
  subject.tensor[kParam] = tensor;
  subject.tensor[kGrad] = grad.unsafeGetTensorImpl();
  subject.streams = kState + group.states;
  if (group.states == 0) return plan_.add(update_of(group, false), place, subject, nullptr);

  bool first = false;
  PyObject* states = states_.at(param, path.position);
  if (states != nullptr) {
    if (!PyDict_Check(states)) return false;
    path.states = states;
    path.keys = reinterpret_cast<PyDictObject*>(states)->ma_keys;
  }
  for (int i = 0; i < group.states; ++i) {
    c10::TensorImpl*& entry = subject.tensor[kState + i];
    DictKey& key = state_keys_[static_cast<std::size_t>(i)];
    PyObject* state = states == nullptr ? nullptr : optional_value_of(key, states);
    if (state == nullptr) {
      first = true;
      entry = nullptr;
      continue;
    }
    if (!exact_tensor(state)) {
      TORCH_CHECK_TYPE(THPVariable_Check(state), at_place(place), ": ",
                       stream_name(rule_, kState + i), " must be a Tensor, not ",
                       Py_TYPE(state)->tp_name, ". Is the checkpoint corrupt?");
      return false;
    }
    path.state[i] = state;
    entry = tensor_of(state).unsafeGetTensorImpl();
  }
  const Update& update = update_of(group, first);
  if (!first) return plan_.add(update, place, subject, nullptr);
  Creation& creation = creations_.emplace_back();
  creation.param = Ref::borrow(param);
  creation.states = Ref::borrow(states);
  creation.count = group.states;
  if (plan_.add(update, place, subject, creation.value)) return true;
  creations_.pop_back();
  return false;
}

// Whatever becomes of a step, nothing of it may keep tensors alive.
struct Walker::Cleanup {
  Walker& walker;
  ~Cleanup() {
    walker.creations_.clear();
    walker.left_.clear();
    walker.plan_.release();
    walker.zero_plan_.release();
  }
};

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
  const Ref groups_kept = Ref::borrow(optional_value_of(param_groups_, attributes));
  const Ref state_kept = Ref::borrow(optional_value_of(state_, attributes));
  PyObject *groups = groups_kept.get(), *state = state_kept.get();
  PyObject* defaults = optional_value_of(defaults_, attributes);
  if (groups == nullptr || !PyList_Check(groups)) return false;
  if (state == nullptr || !PyDict_Check(state)) return false;
  if (defaults == nullptr || !PyDict_Check(defaults)) return false;
  PyObject* differentiable = optional_value_of(differentiable_, defaults);
  bool differentiates = false;
  if (differentiable != nullptr && !read_flag(differentiable, differentiates)) return false;
  if (differentiates || c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  bool skip = false;
  if (!read_scaling(attributes, skip)) return false;
  if (skip) return true;

  states_.begin(state);
  std::size_t number = 0;  // of a parameter, counted over all groups
  constexpr auto ahead = static_cast<Py_ssize_t>(kAhead);
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    const Ref dict_kept = Ref::borrow(PyList_GET_ITEM(groups, g));
    PyObject* dict = dict_kept.get();
    if (!exact_dict(dict)) return all_to_stock();
    const Ref params_kept = Ref::borrow(value_of(params_, dict));
    PyObject* params = params_kept.get();
    if (!PyList_Check(params)) return all_to_stock();
    Group group;
    read_group(dict, static_cast<std::size_t>(g), group);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i, ++number) {
      PyObject* param = PyList_GET_ITEM(params, i);
      if (number == paths_.size()) paths_.emplace_back();
      if (number + kAhead < paths_.size() && i + ahead < PyList_GET_SIZE(params)) {
        const Path& path = paths_[number + kAhead];
        prefetch(PyList_GET_ITEM(params, i + ahead));
        prefetch(path.grad);
        prefetch(path.grad_object);
        if (group.states > 0) {
          prefetch<48>(path.states);
          prefetch<64>(path.keys);
          for (int state = 0; state < group.states; ++state) prefetch(path.state[state]);
        }
      }
      const bool taken =
          exact_tensor(param) ? plan_param({g, i}, group, param, paths_[number]) : !has_grad(param);
      if (taken) continue;
      routes_.resize(static_cast<std::size_t>(std::max(PyList_GET_SIZE(groups), g + 1)));
      leave_to_stock(static_cast<std::size_t>(g), i, param);
    }
  }
  // Duplicates and overlaps run in order. But where stock must take a part, or one parameter is to
  // get its first state twice, only stock knows the order: it takes all. So it does where what it
  // takes shares memory with what it does not.
  if (plan_.ordered() && !(routes_.empty() && creations_.empty())) return all_to_stock();
  if (!left_.empty() && plan_.meets(left_)) return all_to_stock();
  if (!routes_.empty()) return false;
  commit(state);
  plan_.run(true);
  return true;
}

// Notes that stock must take a parameter, and all memory that its step may use.
void Walker::leave_to_stock(std::size_t group, Py_ssize_t index, PyObject* param) {
  routes_[group].push_back(index);
  const auto note = [&](const c10::TensorImpl* tensor) {
    if (tensor == nullptr || !tensor->has_storage()) return;
    const auto begin = reinterpret_cast<std::uintptr_t>(tensor->storage().data());
    const std::uintptr_t bytes = tensor->storage().nbytes();
    if (bytes > 0) left_.push_back({begin, begin + bytes});
  };
  if (!THPVariable_Check(param)) return;
  const c10::TensorImpl* tensor = tensor_of(param).unsafeGetTensorImpl();
  note(tensor);
  if (const at::Tensor* grad = grad_of(param)) note(grad->unsafeGetTensorImpl());
  Py_ssize_t hint = 0, position = 0;
  PyObject *states = states_.at(param, hint), *name, *state;
  while (states != nullptr && PyDict_Check(states) &&
         PyDict_Next(states, &position, &name, &state)) {
    if (exact_tensor(state)) note(tensor_of(state).unsafeGetTensorImpl());
  }
}

// --- new states ---------------------------------------------------------------------------------

void Walker::commit(PyObject* state) {
  if (creations_.empty()) return;
  plan_.retain();  // storing into a dict may run Python code
  for (std::size_t i = 0; i < creations_.size(); ++i) {
    try {
      store(state, creations_[i]);
    } catch (python_error& error) {
      error.persist();
      for (std::size_t j = 0; j <= i; ++j) undo(state, creations_[j]);
      error.restore();
      throw;
    }
  }
}

void Walker::store(PyObject* state, Creation& creation) {
  const bool enters = !creation.states;
  if (enters) creation.states = Ref::steal(checked(PyDict_New()));
  for (int i = 0; i < creation.count; ++i) {
    if (!creation.value[i].defined()) continue;
    DictKey& key = state_keys_[static_cast<std::size_t>(i)];
    creation.before[i] = Ref::borrow(key.in(creation.states.get()));
    const Ref value = Ref::steal(checked(THPVariable_Wrap(creation.value[i])));
    if (PyDict_SetItem(creation.states.get(), key.name(), value.get()) != 0) throw python_error();
  }
  if (!enters) return;
  creation.entered = true;
  if (PyDict_SetItem(state, creation.param.get(), creation.states.get()) != 0) throw python_error();
}

void Walker::undo(PyObject* state, Creation& creation) noexcept {
  for (int i = 0; creation.states && i < creation.count; ++i) {
    if (!creation.value[i].defined()) continue;
    PyObject* name = state_keys_[static_cast<std::size_t>(i)].name();
    if (creation.before[i]) {
      PyDict_SetItem(creation.states.get(), name, creation.before[i].get());
    } else {
      PyDict_DelItem(creation.states.get(), name);
    }
  }
  if (creation.entered) PyDict_DelItem(state, creation.param.get());
  PyErr_Clear();
}

// --- zero_grad ----------------------------------------------------------------------------------

bool Walker::zero_grad(PyObject* optimizer, bool set_to_none, std::vector<Ref>& others) {
  const Busy guard(busy);
  const Cleanup cleanup{*this};
  zero_plan_.begin();
  const Ref kept = Ref::borrow(optional_value_of(param_groups_, attributes_of(optimizer)));
  PyObject* groups = kept.get();
  if (groups == nullptr || !PyList_Check(groups)) return false;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    if (!exact_dict(PyList_GET_ITEM(groups, g))) return false;
  }
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    const Ref params = Ref::steal(checked(PySequence_Fast(
        value_of(params_, PyList_GET_ITEM(groups, g)), "a group's params must be a sequence")));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.get()); ++i) {
      fetch_grads_ahead(params.get(), i);
      PyObject* param = PySequence_Fast_GET_ITEM(params.get(), i);
      if (!exact_tensor(param)) {
        others.push_back(Ref::borrow(param));
      } else if (at::Tensor* grad = grad_of(param)) {
        set_to_none ? grad->reset() : zero(*grad);
      }
    }
  }
  zero_plan_.run(false);
  return true;
}

void Walker::zero(at::Tensor& grad) {
  TORCH_CHECK(
      !grad.is_inference() || c10::InferenceMode::is_enabled(),
      "Inplace update to inference tensor outside InferenceMode is not allowed: a grad made "
      "in inference mode cannot be zeroed. Set it to None instead.");
  if (grad.requires_grad()) {
    if (grad.grad_fn() != nullptr) {
      grad.detach_();
    } else {
      grad.set_requires_grad(false);
    }
  }
  if (!c10::impl::TorchDispatchModeTLS::any_modes_set() && zero_plan_.add_zero(grad)) return;
  zero_plan_.retain();  // a dispatched operator may run Python code
  grad.zero_();
}

}  // namespace fastsgd
