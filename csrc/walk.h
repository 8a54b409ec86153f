// Walks a torch.optim.Optimizer: reads its groups, gradients and states as they are now, and plans
// the step.
#pragma once

#include <Python.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cuda/devices.h"
#include "extras.h"
#include "findings.h"
#include "options.h"
#include "plan.h"
#include "pydict.h"
#include "shards.h"
#include "states.h"
#include "strangers.h"
#include "zero_grad.h"

namespace fastsgd {

// For each group, the indices of the parameters that only stock's path can take.
using Routes = std::vector<std::vector<std::int64_t>>;

// What Python has found out for a step of which stock takes a part, or of which only Python can
// find the norm: the factor of the gradients, and the decay of the averages.
struct Known {
  double factor;
  std::optional<double> decay;
};

// What an optimizer's class has of its own that only stock's step understands: the way that the
// parameters of a group are gathered, or even where its groups, its state or its defaults are.
enum class Foreign : std::uint8_t { kNothing, kGathering, kAttributes };

// What an optimizer keeps between steps: memory, and hints of where things were. Nothing that it
// keeps is believed without being compared, and none of it is state: losing it costs one slow step.
class Walker {
 public:
  // `foreign`: what an optimizer's class says in some way of its own.
  // `findings`: the optimizer's, into which a step enters its own.
  Walker(int rule, Foreign foreign, Findings& findings);

  // Learns where torch keeps the hooks of all optimizers. To be called once, before any question.
  static void learn_hooks();

  // Whether a step of `optimizer` has no hooks to run and no profiler to tell.
  bool unobserved(PyObject* optimizer);

  // Steps everything and returns true; or writes nothing and returns false, where stock must take a
  // part: routes() says which. It is empty where stock must take all. Where it has groups, and all
  // of them are empty, the kernels can take everything, but Python must find the norm first and
  // call again. Throws before anything is written.
  // `known`, if given: Python does the rest of what is around the rule; the kernels only multiply
  // by this factor, clip by value and average with this decay. `taken`, if given: what stock has
  // stepped already in this very step. The others are stepped if the walk finds that exactly these
  // are stock's; else nothing is written and false is returned.
  bool step(PyObject* optimizer, const std::optional<Known>& known = {},
            const Routes* taken = nullptr);
  const Routes& routes() const { return routes_; }
  // Whether the last step left any to stock: then the next will.
  bool left_any() const { return left_any_; }
  // This step will be tried again at once: whoever was asked for a decay need not be asked again.
  void expect_another_try() { findings_.asked = asked_; }
  // Unless something came in between.
  void expect_no_other_try() { findings_.asked = nullptr; }

  // Whether this is for such an optimizer.
  bool is_of(int rule, Foreign foreign) const {
    return rule_number_ == rule && foreign_ == foreign;
  }

  // How many steps devices have skipped.
  std::int64_t skipped_there() const;

  // Resets the gradients, as GradReset does.
  bool zero_grad(PyObject* optimizer, bool set_to_none, std::vector<Ref>& others);

  bool busy = false;  // a step of this optimizer is under way, in another thread or further up

 private:
  // What was met on the way to one parameter's tensors at the last step: what to fetch ahead of
  // meeting it again, and its states.
  struct Path {
    const void* param = nullptr;
    const void* grad_slot = nullptr;
    const void* grad = nullptr;
    PyObject* grad_object = nullptr;
    StatesSeen states;
  };
  // One group at this step, and how its last parameter was updated: on the CPU, and elsewhere.
  struct Group {
    PyObject* dict;
    std::int64_t number;
    const GroupOptions& options;
    int structure;  // of a parameter's states, its average among them
    Moment moment{};
    Update update{};
    const cuda::DeviceWork* work = nullptr;
    Update update_there{};
  };
  // An update that this step has made, and what it is good for.
  struct Made {
    GroupOptions options;
    Moment moment;
    Update update;
  };
  struct Cleanup;

  // Who is to take a step. Parts may be none: then Python is to find the norm, and ask again.
  enum class Way { kKernels, kStock, kParts, kNone };

  Way plan_step(PyObject* groups, PyObject* state, PyObject* defaults, PyObject* attributes,
                const Routes* taken);
  bool plan_all(PyObject* groups, PyObject* state);
  bool plan_groups(PyObject* groups);
  void refuse_options_of_groups(PyObject* groups);
  void leave_to_stock(Place place, PyObject* param);

  bool memory_meets();
  bool set_apart(PyObject* groups);
  bool is_apart(Place place) const;

  void retain();
  void take_step(PyObject* attributes);

  cuda::DeviceWork* alone() const;
  bool norm_is_apart() const;
  bool measure();
  Around around() const;
  void ask_schedule(PyObject* attributes);
  std::int64_t averages_so_far(const Averaged& averaged);
  std::int64_t averages_before(const Averaged& averaged);
  void begin_average(Averaged& averaged, cuda::DeviceWork* there);
  static std::int64_t read(cuda::Device& device, const std::int64_t* there);
  static bool count_is_there(const at::Tensor& count, cuda::Device& device);
  void bring_count(Averaged& averaged, cuda::DeviceWork& there);
  void end_average(PyObject* attributes, Averaged& averaged, bool counts_there);
  void clear(PyObject* groups, bool stepped);
  // Whether zeros are all that clearing a gradient takes, as may be told by little.
  bool zeros_clear(const c10::TensorImpl& grad, const c10::TensorImpl& memory) const {
    return !walks_again_ && Fields::autograd(grad) == nullptr &&
           plain().type_of(memory) != kStorages;
  }
  [[gnu::noinline]] bool look_before_clearing(Place place, const at::Tensor& grad,
                                              const c10::TensorImpl& memory);
  [[gnu::noinline]] bool plan_average(Place place, PyObject* param);

  void plan_group(Group& group, std::size_t& number);
  template <bool kCounts, int... kStates>
  void plan_params(Group& group, std::size_t& number, int states,
                   std::integer_sequence<int, kStates...>);
  template <int kStates, bool kCounts>
  void plan_params(Group& group, std::size_t& number);
  template <class Kind, int kStates, bool kCounts>
  [[gnu::always_inline]] inline bool plan_param(Group& group, Py_ssize_t index, PyObject* param,
                                                Path& path, Shards::Seen* seen);
  // Out of line, as GCC would else keep the variables of what is rare on the usual way's stack.
  template <int kStates, bool kCounts>
  [[gnu::noinline]] Py_ssize_t plan_shards(Group& group, Py_ssize_t index, std::size_t number);
  // The same on another device than the CPU.
  template <int kStates, bool kCounts>
  [[gnu::noinline]] bool plan_on_device(cuda::DeviceWork& work, Group& group, Place place,
                                        Subject& subject, Owners owners, const StatesSeen& seen);
  bool plan_first_on_device(cuda::DeviceWork& work, Group& group, Place place, Subject& subject,
                            Owners owners, Creation& creation, const Birth& birth);
  [[gnu::noinline]] bool plan_first(Place place, Group& group, Subject& subject, Owners owners,
                                    const StatesSeen& seen, const Birth& birth,
                                    const std::vector<at::Tensor>& made);
  [[gnu::noinline]] bool plan_first_shard(Place place, Group& group, Subject& subject,
                                          const Path& path, Shards::Seen& seen);
  Birth birth(const Group& group) const;
  bool makes_rules_states(const Group& group, const Subject& subject,
                          const Creation& creation) const;
  at::Tensor new_counter(PyObject* group, c10::Device device);
  at::Tensor counter_on(cuda::DeviceWork& work, Place place, c10::TensorImpl& counter) const;
  template <int kValues>
  static void fetch(const Path& path);
  template <bool kCounts>
  const Update& update_of(Group& group, const Moment& moment) {
    const bool same =
        kCounts ? group.moment.step == moment.step : group.moment.first == moment.first;
    if (same && group.update.row >= 0) [[likely]]
      return group.update;
    return find_update(group, moment);
  }
  [[gnu::noinline]] const Update& find_update(Group& group, const Moment& moment);
  Update make_update(const Group& group, const Moment& moment);
  // `greatest`: what a dtype must be able to hold.
  Update update_with(const Group& group, std::int32_t row, double greatest = 0) const;
  const Update& update_on(cuda::DeviceWork& work, Group& group);

  const Foreign foreign_;
  Findings& findings_;
  const Rule& rule_;
  int rule_number_;
  ExtrasReader extras_reader_;
  OptionReader options_;
  States states_;
  Plan plan_;
  cuda::Devices devices_;
  std::vector<cuda::DeviceWork*> works_;  // of this step
  std::uint64_t cpu_keys_ = 0;  // of plain tensors for which the CPU's kernels are to work
  Routes routes_;
  DictKey param_groups_{"param_groups"}, state_{"state"}, defaults_{"defaults"}, params_{"params"},
      differentiable_{"differentiable"}, pre_hooks_{"_optimizer_step_pre_hooks"},
      post_hooks_{"_optimizer_step_post_hooks"}, fused_{"fused"}, init_group_{"_init_group"};
  DictKey fill_;  // the default that new states are filled with, if the rule has one
  double fill_value_ = 0;
  std::vector<Path> paths_;  // one for each parameter, and some to look ahead into
  Strangers strangers_;
  Shards shards_;
  std::vector<Shards::Seen> shards_seen_;  // one for each parameter, where any is distributed
  std::vector<Range> left_;                // memory of the parameters that are left to stock
  std::vector<Place> apart_;               // parameters left to stock as they share memory
  bool hidden_ = false;                    // some of theirs cannot be seen
  bool left_any_ = false;                  // at the last step
  std::vector<Made> made_;
  Scaling scaling_;
  const Extras* extras_ = nullptr;  // at this step
  Extras known_extras_;             // those, where Python has done a part
  double factor_ = 1, decay_ = 0;   // theirs, once they are known
  std::int64_t averages_ = 0;       // those before this step, for which a schedule was asked
  const void* asked_ = nullptr;     // that schedule
  bool starts_ = false;             // averages begin with this step
  bool clears_in_pass_ = false;     // the kernels set the gradients to zero
  bool looks_before_clearing_ = false;
  bool walks_again_ = false;  // as that has turned out to be wrong
  std::int32_t average_row_ = -1;
  bool has_shards_ = false;  // some parameters of this walk are distributed
  GradReset grad_reset_;
  std::vector<at::Tensor> in_graphs_;                     // gradients to detach once they are zero
  cuda::Measuring measuring_;                             // what a device is to find at this step
  bool meets_new_grads_ = false, met_new_grads_ = false;  // at this step; at the last one
};

// The attributes of an object; the dict stays alive with the object.
PyObject* attributes_of(PyObject* object);

// Marks a walker busy for as long as it works on a step.
class Busy {
 public:
  explicit Busy(bool& flag) : flag_(flag) { flag_ = true; }
  ~Busy() { flag_ = false; }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  bool& flag_;
};

// Whatever becomes of a step, nothing of it may keep tensors alive.
struct Walker::Cleanup {
  Walker& walker;
  ~Cleanup() {
    walker.shards_.end_step();
    walker.in_graphs_.clear();
    walker.states_.clear();
    walker.left_.clear();
    walker.strangers_.end_step();
    walker.plan_.release();
    for (const auto& work : walker.devices_.all()) work->plan.release();
    walker.grad_reset_.release();
  }
};

}  // namespace fastsgd
