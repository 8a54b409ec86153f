#include "states.h"

#include <algorithm>

namespace fastsgd {

States::States(const Rule& rule) : rule_(rule) {
  for (int i = 0; i < rule.max_states; ++i) keys_.emplace_back(rule.states[i]);
}

void States::begin(PyObject* state) {
  state_ = state;
  version_ = version_of(state);
  map_.begin(state);
}

States::Found States::find(Place place, PyObject* param, int structure, int count, StatesSeen& seen,
                           c10::TensorImpl** states) {
  seen.version = 0;
  std::fill_n(states, count, nullptr);
  seen.param = param;
  seen.states = map_.at(param, seen.position);
  if (seen.states == nullptr) return Found::kSome;
  if (!PyDict_Check(seen.states)) return Found::kForeign;
  bool all = true;
  for (int i = 0; i < count; ++i) {
    PyObject* state = keys_[static_cast<std::size_t>(i)].optional_in(seen.states);
    if (state == nullptr) {
      all = false;
      continue;
    }
    if (!exact_tensor(state)) {
      TORCH_CHECK_TYPE(THPVariable_Check(state), at_place(place), ": ",
                       stream_name(rule_, kState + i), " must be a Tensor, not ",
                       Py_TYPE(state)->tp_name, ". Is the checkpoint corrupt?");
      return Found::kForeign;
    }
    seen.value[i] = state;
    states[i] = impl_of(state);
  }
  if (!all) return Found::kSome;
  seen.version_of_states = version_of(seen.states);
  if (seen.version_of_states != 0) seen.version = version_;
  seen.structure = structure;
  return Found::kAll;
}

Creation& States::create(const StatesSeen& seen, int count) {
  Creation& creation = creations_.emplace_back();
  creation.param = Ref::borrow(seen.param);
  creation.states = Ref::borrow(seen.states);
  creation.count = count;
  return creation;
}

void States::commit() {
  for (std::size_t i = 0; i < creations_.size(); ++i) {
    try {
      store(creations_[i]);
    } catch (python_error& error) {
      error.persist();
      for (std::size_t j = 0; j <= i; ++j) undo(creations_[j]);
      error.restore();
      throw;
    }
  }
}

void States::store(Creation& creation) {
  const bool enters = !creation.states;
  if (enters) creation.states = Ref::steal(checked(PyDict_New()));
  for (int i = 0; i < creation.count; ++i) {
    if (!creation.value[i].defined()) continue;
    DictKey& key = keys_[static_cast<std::size_t>(i)];
    creation.before[i] = Ref::borrow(key.in(creation.states.get()));
    const Ref value = Ref::steal(checked(THPVariable_Wrap(creation.value[i])));
    if (PyDict_SetItem(creation.states.get(), key.name(), value.get()) != 0) throw python_error();
  }
  if (!enters) return;
  creation.entered = true;
  if (PyDict_SetItem(state_, creation.param.get(), creation.states.get()) != 0) {
    throw python_error();
  }
}

void States::undo(Creation& creation) noexcept {
  for (int i = 0; creation.states && i < creation.count; ++i) {
    if (!creation.value[i].defined()) continue;
    PyObject* name = keys_[static_cast<std::size_t>(i)].name();
    if (creation.before[i]) {
      PyDict_SetItem(creation.states.get(), name, creation.before[i].get());
    } else {
      PyDict_DelItem(creation.states.get(), name);
    }
  }
  if (creation.entered) PyDict_DelItem(state_, creation.param.get());
  PyErr_Clear();
}

}  // namespace fastsgd
