// Walks a torch.optim.Optimizer: reads its groups, gradients and states as they are now, and plans
// the step. This is the only file, with bindings.cpp, that knows Python's objects.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "plan.h"
#include "pydict.h"

namespace fastsgd {

// For each group, the indices of the parameters that only stock's path can take.
using Routes = std::vector<std::vector<std::int64_t>>;

// What one optimizer keeps between steps: memory, and hints of where things were. Nothing that it
// keeps is believed without being compared, and none of it is state: losing it costs one slow step.
class Walker {
 public:
  explicit Walker(int rule);

  // Whether a step of `optimizer` has no hooks to run and no profiler to tell.
  bool unobserved(PyObject* optimizer);

  // Steps everything and returns true; or writes nothing and returns false, where stock must take a
  // part: routes() says which, and is empty where that is all. Throws before anything is written.
  bool step(PyObject* optimizer);
  const Routes& routes() const { return routes_; }

  // Resets the gradients and returns true, with the parameters that are not plain tensors left in
  // `others`; or does nothing and returns false, where the groups are kept in some way of their
  // own.
  bool zero_grad(PyObject* optimizer, bool set_to_none, std::vector<Ref>& others);

  bool busy = false;  // a step of this optimizer is under way, in another thread or further up

 private:
  // One hyper-parameter of one group: its value belongs to the immutable object that was seen
  // there.
  struct Seen {
    Ref object;
    double value = 0;
  };
  struct GroupMemory {
    std::vector<Seen> seen;
  };
  // What was met on the way to one parameter's tensors at the last step: where its states were
  // found, and what to fetch ahead of meeting it again.
  struct Path {
    Py_ssize_t position = 0;
    const void* grad = nullptr;  // where the parameter keeps it
    const void* grad_object = nullptr;
    const void* states = nullptr;
    const void* keys = nullptr;  // of the dict of states
    const void* state[kMaxStates];
  };
  // The options of one group at this step, and its rows of scalars so far.
  struct Group {
    PyObject* dict;
    double hypers[kMaxHypers];
    bool maximize = false;
    bool readable = false;  // false: an option only stock can interpret
    int structure = 0, states = 0;
    Update update[2];  // of parameters at a later and at their first step
  };
  // A state that this step creates.
  struct Creation {
    Ref param, states;  // the states' dict, or null where the parameter has none yet
    at::Tensor value[kMaxStates];
    bool entered = false;    // into the optimizer's state, by this step
    Ref before[kMaxStates];  // what an existing dict held under the state's name
    int count = 0;
  };

  void read_group(PyObject* dict, std::size_t number, Group& group);
  void refuse_options(const Place& place, PyObject* group, PyObject* param);
  bool read_number(PyObject* object, Hyper::Kind kind, Seen& seen, double& value);
  bool read_scaling(PyObject* attributes, bool& skip);
  [[gnu::always_inline]] inline bool plan_param(const Place& place, Group& group, PyObject* param,
                                                Path& path);
  void zero(at::Tensor& grad);
  struct Cleanup;
  bool all_to_stock();
  void leave_to_stock(std::size_t group, Py_ssize_t index, PyObject* param);
  const Update& update_of(Group& group, bool first) {
    const Update& update = group.update[first ? 1 : 0];
    return update.row >= 0 ? update : make_update(group, first);
  }
  const Update& make_update(Group& group, bool first);
  void commit(PyObject* state);
  void store(PyObject* state, Creation& creation);
  void undo(PyObject* state, Creation& creation) noexcept;

  const Rule& rule_;
  int rule_number_;
  Plan plan_, zero_plan_;
  Routes routes_;
  DictKey param_groups_{"param_groups"}, state_{"state"}, defaults_{"defaults"}, params_{"params"},
      differentiable_{"differentiable"}, maximize_{"maximize"}, grad_scale_{"grad_scale"},
      found_inf_{"found_inf"}, pre_hooks_{"_optimizer_step_pre_hooks"},
      post_hooks_{"_optimizer_step_post_hooks"};
  std::vector<DictKey> hyper_keys_, state_keys_;
  std::vector<GroupMemory> groups_;
  std::vector<Path> paths_;  // one for each parameter
  IdentityMap states_;
  std::vector<Creation> creations_;
  std::vector<Range> left_;  // memory of the parameters that are left to stock
  double scale_ = 1;
  bool unscale_ = false;
};

}  // namespace fastsgd
