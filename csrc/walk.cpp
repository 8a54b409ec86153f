#include "walk.h"

#include <ATen/SparseTensorImpl.h>
#include <ATen/record_function.h>
#include <c10/core/UndefinedTensorImpl.h>

#include <algorithm>
#include <utility>

#include "cuda/emulation.h"
#include "modes.h"
#include "prefetch.h"
#include "pytensor.h"
#include "rules/table.h"

namespace fastsgd {
namespace {

PyObject* globals_of_hooks = nullptr;  // kept for good

// Whether a dictionary of torch's has any hooks; true of what is none, as then only Python can
// tell.
bool any_in(PyObject* hooks) {
  return hooks == nullptr || !PyDict_Check(hooks) || PyDict_Size(hooks) != 0;
}

// Hooks of every optimizer: globals of a module, so that somebody may bind others.
bool any_global_hook() {
  static DictKey& pre = *new DictKey("_global_optimizer_pre_hooks");
  static DictKey& post = *new DictKey("_global_optimizer_post_hooks");
  return any_in(pre.in(globals_of_hooks)) || any_in(post.in(globals_of_hooks));
}

// Whether both name the same parameters; one may name groups at its end of which it names none.
bool same_routes(const Routes& a, const Routes& b) {
  if (a.size() > b.size()) return same_routes(b, a);
  const auto rest = b.begin() + static_cast<std::ptrdiff_t>(a.size());
  return std::equal(a.begin(), a.end(), b.begin()) &&
         std::all_of(rest, b.end(), [](const auto& route) { return route.empty(); });
}

}  // namespace

PyObject* attributes_of(PyObject* object) {
  const Ref dict = Ref::steal(checked(PyObject_GenericGetDict(object, nullptr)));
  return dict.get();
}

Walker::Walker(int rule, Foreign foreign, Findings& findings)
    : foreign_(foreign),
      findings_(findings),
      rule_(rule_at(rule)),
      rule_number_(rule),
      options_(rule_),
      states_(rule_),
      fill_(rule_.fill == nullptr ? "" : rule_.fill) {}

void Walker::learn_hooks() {
  const Ref module = Ref::steal(checked(PyImport_ImportModule("torch.optim.optimizer")));
  globals_of_hooks = PyModule_GetDict(module.get());
  Py_INCREF(globals_of_hooks);
}

bool Walker::unobserved(PyObject* optimizer) {
  if (at::hasCallbacks() || any_global_hook()) return false;
  PyObject* attributes = attributes_of(optimizer);
  return !any_in(pre_hooks_.in(attributes)) && !any_in(post_hooks_.in(attributes));
}

// False where the groups are kept in some way that only stock understands.
bool Walker::plan_groups(PyObject* groups) {
  std::size_t number = 0;  // of a parameter, counted over all groups
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    options_.fetch(static_cast<std::size_t>(g) + kAhead);
    PyObject* dict = PyList_GET_ITEM(groups, g);
    if (!exact_dict(dict)) return false;
    const auto index = static_cast<std::size_t>(g);
    if (!options_.knows(dict, index)) extras_reader_.refuse_in(dict);
    const GroupOptions& options = options_.read(dict, index);
    const int averaged = extras_->averages ? kMaxStructures : 0;
    Group group{dict, g, options, options.structure + averaged};
    if (!PyList_CheckExact(group.options.params)) return false;
    plan_group(group, number);
  }
  return true;
}

// Those of groups that may not have been read, as stock takes them unread.
void Walker::refuse_options_of_groups(PyObject* groups) {
  if (groups == nullptr || !PyList_Check(groups)) return;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* group = PyList_GET_ITEM(groups, g);
    if (PyDict_Check(group)) extras_reader_.refuse_in(group);
  }
}

// Walks until nothing is left to ask: no Python code runs within a walk, but between two of them.
// What the last walk still asks about it has left to stock.
bool Walker::plan_all(PyObject* groups, PyObject* state) {
  // One that meets a stranger, one that wants its states, one that meets specs, one that meets a
  // gradient that is not to be zeroed in the pass; the fifth steps.
  constexpr int kWalks = 5;
  strangers_.begin_step();
  for (int walk = 0; walk < kWalks; ++walk) {
    if (strangers_.asks()) strangers_.answer(groups);
    if (shards_.asks()) shards_.answer();
    routes_.clear();
    left_.clear();
    hidden_ = false;
    made_.clear();
    in_graphs_.clear();
    has_shards_ = false;
    walks_again_ = false;
    looks_before_clearing_ = extras_->clear == Extras::Clear::kToZero;
    average_row_ = -1;
    strangers_.begin_walk();
    options_.begin();
    states_.begin(state);
    plan_.begin();
    for (const auto& work : devices_.all()) work->begin();
    if (!plan_groups(groups)) return false;
    if (!strangers_.asks() && !shards_.asks() && !walks_again_) break;
  }
  return true;
}

// Plans a step, or finds who else must take it.
Walker::Way Walker::plan_step(PyObject* groups, PyObject* state, PyObject* defaults,
                              PyObject* attributes, const Routes* taken) {
  if (groups == nullptr || !PyList_CheckExact(groups)) return Way::kStock;
  if (state == nullptr || !is_dict_of_dicts(state)) return Way::kStock;
  if (defaults == nullptr || !PyDict_Check(defaults)) return Way::kStock;
  PyObject* differentiable = differentiable_.optional_in(defaults);
  bool differentiates = false;
  if (differentiable != nullptr && !read_flag(differentiable, differentiates)) return Way::kStock;
  if (differentiates || foreign_ != Foreign::kNothing || any_mode()) return Way::kStock;
  if (init_group_.optional_in(attributes) != nullptr) return Way::kStock;  // one of its own
  scaling_ = options_.read_scaling(attributes);
  if (!scaling_.readable) return Way::kStock;
  if (scaling_.skip) return Way::kNone;
  if (rule_.fill != nullptr) {
    PyObject* fill = fill_.optional_in(defaults);
    if (fill == nullptr || (!PyFloat_Check(fill) && !PyLong_Check(fill))) return Way::kStock;
    fill_value_ = PyFloat_AsDouble(fill);
    if (fill_value_ == -1 && PyErr_Occurred()) throw python_error();
  }

  cpu_keys_ = cuda::emulated() ? 0 : plain().keys;
  met_new_grads_ = std::exchange(meets_new_grads_, false);
  if (taken == nullptr) apart_.clear();
  if (!plan_all(groups, state)) return Way::kStock;
  // Duplicates and overlaps are in order where only stock knows that: it takes the parameters that
  // share memory, and the kernels the others.
  if (memory_meets()) {
    if (hidden_ || taken != nullptr || !set_apart(groups)) return Way::kStock;
    if (!plan_all(groups, state) || memory_meets()) return Way::kStock;
  }
  if (hidden_ || states_.creates_twice()) return Way::kStock;
  const bool none_here = plan_.empty() && works_.empty();
  if (taken == nullptr && none_here && !routes_.empty()) return Way::kStock;  // all of them
  if (!routes_.empty()) routes_.resize(static_cast<std::size_t>(PyList_GET_SIZE(groups)));
  for (cuda::DeviceWork* work : works_) {
    // Which reads the scaler's values where it can reach them.
    if (scaling_.there_is_any() && scaling_.device != work->device().tensors()) return Way::kStock;
  }
  if (scaling_.device && !plan_.empty()) return Way::kStock;
  if (extras_->measures() && routes_.empty() && norm_is_apart()) {
    routes_.resize(static_cast<std::size_t>(PyList_GET_SIZE(groups)));
  }
  const bool all = taken == nullptr ? routes_.empty() : same_routes(routes_, *taken);
  return all ? Way::kKernels : Way::kParts;
}

bool Walker::step(PyObject* optimizer, const std::optional<Known>& known, const Routes* taken) {
  const Busy guard(busy);
  const Cleanup cleanup{*this};
  Ref kept = Ref::borrow(attributes_of(optimizer));
  const auto read_extras = [&] {
    extras_ = &extras_reader_.read(kept.get());
    TORCH_CHECK(!extras_->swapped,
                "step() inside ema_weights(): the parameters hold their averages. Leave the block "
                "before the next step.");
    if (!known) return;
    known_extras_ = extras_->with(known->factor, known->decay);
    extras_ = &known_extras_;
  };
  read_extras();
  asked_ = nullptr;
  if (extras_->schedule != nullptr) {
    ask_schedule(kept.get());
    kept = Ref::borrow(attributes_of(optimizer));
    read_extras();
  }
  PyObject* attributes = kept.get();
  const Ref groups = Ref::borrow(param_groups_.optional_in(attributes));
  const Ref state = Ref::borrow(state_.optional_in(attributes));
  const Ref defaults = Ref::borrow(defaults_.optional_in(attributes));
  factor_ = extras_->factor;
  decay_ = asked_ != nullptr && extras_->schedule != nullptr ? findings_.decay : extras_->decay;
  clears_in_pass_ = extras_->clear == Extras::Clear::kToZero;
  works_.clear();
  const Way way = plan_step(groups.get(), state.get(), defaults.get(), attributes, taken);
  if (way != Way::kParts) routes_.clear();
  const bool leaves = way == Way::kStock || way == Way::kParts;
  if (taken == nullptr) left_any_ = leaves;
  if (leaves) {
    if (way == Way::kStock) refuse_options_of_groups(groups.get());
    // What would raise in the kernels' part does so before torch's is stepped.
    if (extras_->averages && way == Way::kParts && alone() != nullptr) {
      count_is_there(extras_reader_.averaged(attributes).there, alone()->device());
    }
    findings_.averages_of = nullptr;  // which Python is to count
    return false;
  }
  bool steps = way == Way::kKernels;
  measuring_ = {};
  if (steps && extras_->measures()) steps = measure();
  if (steps) take_step(attributes);
  if (extras_->clear != Extras::Clear::kKeep) clear(groups.get(), steps);
  return true;
}

bool Walker::zero_grad(PyObject* optimizer, bool set_to_none, std::vector<Ref>& others) {
  const Busy guard(busy);
  const Cleanup cleanup{*this};
  const Ref groups = Ref::borrow(param_groups_.optional_in(attributes_of(optimizer)));
  return foreign_ != Foreign::kAttributes && grad_reset_.reset(groups.get(), set_to_none, others);
}

// Keeps alive all that the step is of: Python code may run meanwhile.
void Walker::retain() {
  plan_.retain();
  for (cuda::DeviceWork* work : works_) work->plan.retain();
}

// Takes the step that is planned. What may fail, or run Python code, comes first.
void Walker::take_step(PyObject* attributes) {
  cuda::DeviceWork* there = alone();
  Averaged averaged;
  if (extras_->averages) {  // read now: to plan and to measure may have run Python code
    averaged = extras_reader_.averaged(attributes);
    begin_average(averaged, there);
  }
  const Around around = this->around();
  const bool counts_there = averaged.there.defined() && there != nullptr;
  auto* counted_there =
      static_cast<std::int64_t*>(counts_there ? averaged.there.mutable_data_ptr() : nullptr);
  for (cuda::DeviceWork* work : works_) {
    work->prepare(scaling_, around, measuring_, counted_there);
  }
  plan_.retain_for_kernels();
  const auto last = [&] {
    if (extras_->averages) end_average(attributes, averaged, counts_there);
  };
  if (states_.creates()) {
    retain();  // storing into a dict may run Python code
    states_.commit(last);
  } else {
    last();
  }
  if (measuring_.any) findings_.found_there(*there, measuring_.is_double);
  // Devices first: they work beside the CPU, which may give up the GIL that their tensors need.
  for (cuda::DeviceWork* work : works_) work->launch();
  plan_.run(around, true);
}

// Notes that stock must take a parameter, and all memory that its step may use.
void Walker::leave_to_stock(Place place, PyObject* param) {
  const auto group = static_cast<std::size_t>(place.group);
  if (routes_.size() <= group) routes_.resize(group + 1);
  routes_[group].push_back(place.index);
  const auto note = [&](const auto& self, c10::TensorImpl* tensor) -> void {
    if (tensor == nullptr || tensor == c10::UndefinedTensorImpl::singleton()) return;
    PyObject* object = object_of(*tensor);
    if (object != nullptr && LocalShards::is(object)) tensor = LocalShards::memory(object);
    const bool may_ask = !tensor->is_python_dispatch();  // else that would run Python code
    if (!may_ask) hidden_ = true;
    if (may_ask && tensor->layout() == at::kSparse) {
      const auto* sparse = static_cast<const at::SparseTensorImpl*>(tensor);
      self(self, sparse->indices().unsafeGetTensorImpl());
      self(self, sparse->values().unsafeGetTensorImpl());
    } else if (!tensor->has_storage()) {
      hidden_ = true;
    } else if (const Range range = reach(*tensor); range.begin < range.end) {
      left_.push_back(range);
    }
  };
  if (!any_tensor(param)) return;
  c10::TensorImpl* tensor = impl_of(param);
  note(note, tensor);
  if (const at::Tensor* grad = grad_slot(*tensor)) {
    TORCH_CHECK(rule_.sparse_error == nullptr || !grad->defined() || !grad->is_sparse(),
                rule_.sparse_error);
    note(note, grad->unsafeGetTensorImpl());
  }
  PyObject *states = states_.of(param), *name, *state;
  Py_ssize_t position = 0;
  hidden_ |= states != nullptr && !exact_dict(states) && !PyList_Check(states);  // no states at all
  while (states != nullptr && exact_dict(states) && PyDict_Next(states, &position, &name, &state)) {
    if (any_tensor(state)) note(note, impl_of(state));
  }
}

}  // namespace fastsgd
