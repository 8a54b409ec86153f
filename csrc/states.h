// An optimizer's `state`: finds the states of each parameter, and enters new ones.
#pragma once

#include <Python.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "pydict.h"
#include "pytensor.h"
#include "shards.h"
#include "tensors.h"

namespace fastsgd {

// What one parameter's states were at the last step. Objects are compared, or known by the version
// of the dictionary that holds them; none is followed before that.
struct StatesSeen {
  std::uint64_t version = 0, version_of_states = 0;  // of `state`, and of what it has for `param`
  PyObject* param = nullptr;
  PyObject* states = nullptr;
  PyObject* value[kMaxStates + 1] = {};
  int structure = -1;
  Py_ssize_t position = 0;  // in `state`
};

// States that this step creates for a parameter.
struct Creation {
  Ref param, states;  // the states' dict, or null where the parameter has none yet
  const Structure* structure = nullptr;
  at::Tensor value[kMaxStates + 1];
  bool entered = false;        // into the optimizer's state, by this step
  int stored = 0;              // how many of the values, in the order of entering them
  Ref before[kMaxStates + 1];  // what an existing dict held under the state's name
};

class States {
 public:
  explicit States(const Rule& rule);

  // The optimizer's state, for this walk.
  void begin(PyObject* state);
  // Lets go of what a walk has left.
  void clear() { creations_.clear(); }

  // The memory of the parameter's states as they were seen, if nothing can have changed since; and
  // after them its counter, if the rule counts.
  template <class Kind, int kStates, bool kCounts>
  bool recall(PyObject* param, int structure, const StatesSeen& seen,
              c10::TensorImpl** states) const {
    if (version_ == 0 || seen.version != version_ || seen.param != param) return false;
    if (version_of(seen.states) != seen.version_of_states || seen.structure != structure) {
      return false;
    }
    for (int i = 0; i < kStates; ++i) {
      if (!Kind::is(seen.value[i])) return false;
      states[i] = Kind::memory(seen.value[i]);
    }
    if constexpr (kCounts) {
      if (!exact_tensor(seen.value[kStates])) return false;
      states[kStates] = impl_of(seen.value[kStates]);
    }
    return true;
  }

  enum class Found { kAll, kSome, kForeign };  // all; not all; something only stock understands

  // The same by looking; null for a state that is to be made. Throws for one that stock would miss.
  template <class Kind>
  Found find(Place place, PyObject* param, int structure, StatesSeen& seen,
             c10::TensorImpl** states);

  // The dict of a parameter's states; null if there is none.
  PyObject* of(PyObject* param) {
    Py_ssize_t position = 0;
    return map_.at(param, position);
  }

  // Its average, whatever it is; null if there is none.
  PyObject* average_of(PyObject* param);

  // Notes that those states of a structure that were not found come to be with this step.
  Creation& create(const StatesSeen& seen, int structure);
  void create_no_more() { creations_.pop_back(); }
  bool creates() const { return !creations_.empty(); }
  // Whether one place is to get states twice. Their memory does not tell where it has no elements.
  bool creates_twice() const;

  // Enters what is created, and then does what comes `last`. If either raises, it is as if nothing
  // had been entered.
  void commit(const std::function<void()>& last);

 private:
  int value_count(const Structure& structure) const { return structure.count + rule_.counts; }
  std::string value_name(const Structure& structure, int value) const;
  DictKey& key(const Structure& structure, int value) {
    return value == structure.count ? step_
                                    : keys_[static_cast<std::size_t>(structure.number[value])];
  }
  void store(Creation& creation);
  void store(Creation& creation, int value);
  int value_at(const Creation& creation, int turn) const;
  void undo(Creation& creation) noexcept;

  const Rule& rule_;
  std::vector<DictKey> keys_;  // of the rule's states, and last the average's
  DictKey step_{"step"};
  PyObject* state_ = nullptr;
  std::uint64_t version_ = 0;
  IdentityMap map_;
  std::vector<Creation> creations_;
};

}  // namespace fastsgd
