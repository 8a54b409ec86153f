#include "states.h"

#include <algorithm>

namespace fastsgd {

States::States(const Rule& rule) : rule_(rule) {
  for (int i = 0; i < rule.state_count; ++i) keys_.emplace_back(rule.states[i].name);
  keys_.emplace_back(kAverageState.name);
}

void States::begin(PyObject* state) {
  state_ = state;
  version_ = version_of(state);
  map_.begin(state);
  clear();
}

std::string States::value_name(const Structure& structure, int value) const {
  return value == structure.count ? "its state 'step'" : stream_name(structure, kState + value);
}

template <class Kind>
States::Found States::find(Place place, PyObject* param, int structure, StatesSeen& seen,
                           c10::TensorImpl** states) {
  const Structure& wanted = rule_.structures[structure];
  const int count = value_count(wanted);
  seen.version = 0;
  std::fill_n(states, count, nullptr);
  seen.param = param;
  seen.states = map_.at(param, seen.position);
  if (seen.states == nullptr) return Found::kSome;
  if (!exact_dict(seen.states)) return Found::kForeign;
  const bool all_or_none = rule_.counts;
  if (all_or_none && PyDict_Size(seen.states) == 0) return Found::kSome;
  bool all = true;
  for (int i = 0; i < count; ++i) {
    PyObject* state = key(wanted, i).in(seen.states);
    const bool may_lack = !all_or_none || i == wanted.average;
    if (may_lack && (state == nullptr || state == Py_None)) {
      all = false;
      continue;
    }
    if (state == nullptr) {
      PyErr_SetString(PyExc_KeyError,
                      c10::str(at_place(place), " lacks ", value_name(wanted, i),
                               ". Was an option turned on that needs it, after the first step?")
                          .c_str());
      throw python_error();
    }
    const bool counter = i == wanted.count;
    if (!(counter ? exact_tensor(state) : Kind::is(state))) {
      TORCH_CHECK_TYPE(any_tensor(state), at_place(place), ": ", value_name(wanted, i),
                       " must be a Tensor, not ", Py_TYPE(state)->tp_name,
                       ". Is the checkpoint corrupt?");
      return Found::kForeign;
    }
    seen.value[i] = state;
    states[i] = counter ? impl_of(state) : Kind::memory(state);
  }
  if (!all) return Found::kSome;
  seen.version_of_states = version_of(seen.states);
  if (seen.version_of_states != 0) seen.version = version_;
  seen.structure = structure;
  return Found::kAll;
}

template States::Found States::find<PlainTensors>(Place, PyObject*, int, StatesSeen&,
                                                  c10::TensorImpl**);
template States::Found States::find<LocalShards>(Place, PyObject*, int, StatesSeen&,
                                                 c10::TensorImpl**);

PyObject* States::average_of(PyObject* param) {
  PyObject* states = of(param);
  return states == nullptr || !exact_dict(states) ? nullptr : keys_.back().optional_in(states);
}

Creation& States::create(const StatesSeen& seen, int structure) {
  Creation& creation = creations_.emplace_back();
  creation.param = Ref::borrow(seen.param);
  creation.states = Ref::borrow(seen.states);
  creation.structure = &rule_.structures[structure];
  return creation;
}

bool States::creates_twice() const {
  std::vector<PyObject*> places;
  for (const Creation& creation : creations_) {
    places.push_back(creation.states ? creation.states.get() : creation.param.get());
  }
  std::sort(places.begin(), places.end());
  return std::adjacent_find(places.begin(), places.end()) != places.end();
}

void States::commit(const std::function<void()>& last) {
  const auto undo_all = [&] {
    for (Creation& creation : creations_) undo(creation);
  };
  try {
    for (Creation& creation : creations_) store(creation);
    last();
  } catch (python_error& error) {
    error.persist();
    undo_all();
    error.restore();
    throw;
  } catch (...) {
    PyErr_Clear();  // where torch can make no object of a tensor, it leaves Python's error too
    undo_all();
    throw;
  }
}

// Stock's order, in which a checkpoint then lists them.
int States::value_at(const Creation& creation, int turn) const {
  if (!rule_.counts) return turn;
  return turn == 0 ? creation.structure->count : turn - 1;
}

void States::store(Creation& creation) {
  const bool enters = !creation.states;
  if (enters) creation.states = Ref::steal(checked(PyDict_New()));
  const int count = value_count(*creation.structure);
  for (int turn = 0; turn < count; ++turn) store(creation, value_at(creation, turn));
  if (!enters) return;
  creation.entered = true;
  if (PyDict_SetItem(state_, creation.param.get(), creation.states.get()) != 0) {
    throw python_error();
  }
}

void States::store(Creation& creation, int value) {
  DictKey& name = key(*creation.structure, value);
  creation.before[value] = Ref::borrow(name.in(creation.states.get()));
  ++creation.stored;
  if (!creation.value[value].defined()) return;
  const Ref object = Ref::steal(checked(THPVariable_Wrap(creation.value[value])));
  if (PyDict_SetItem(creation.states.get(), name.name(), object.get()) != 0) throw python_error();
}

void States::undo(Creation& creation) noexcept {
  for (int turn = 0; turn < creation.stored; ++turn) {
    const int value = value_at(creation, turn);
    if (!creation.value[value].defined()) continue;
    PyObject* name = key(*creation.structure, value).name();
    if (creation.before[value]) {
      PyDict_SetItem(creation.states.get(), name, creation.before[value].get());
    } else {
      PyDict_DelItem(creation.states.get(), name);
    }
  }
  if (creation.entered) PyDict_DelItem(state_, creation.param.get());
  PyErr_Clear();
}

}  // namespace fastsgd
