// The part of a step that is not the rule's: the norm, averages, clearing.
#include <ATen/ops/full.h>

#include <cmath>
#include <utility>

#include "gil.h"
#include "pycall.h"
#include "pytensor.h"
#include "walk.h"

namespace fastsgd {

// The device on which all of the step is done; null if it is done here, or in several places.
cuda::DeviceWork* Walker::alone() const {
  return works_.size() == 1 && plan_.empty() ? works_.front() : nullptr;
}

// --- the norm -----------------------------------------------------------------------------------

// Whether Python is to find it: each process has a part of it, and each device; and what is an
// error must be known here.
bool Walker::norm_is_apart() const {
  const std::size_t places = works_.size() + (plan_.empty() ? 0 : 1);
  return has_shards_ || places > 1 || (!works_.empty() && extras_->raises);
}

// Measures the gradients of a planned step, or sees to it that their device does. Returns whether
// the step is to be taken, for all that is known here; throws where the norm is not finite and that
// is an error.
bool Walker::measure() {
  cuda::DeviceWork* there = alone();
  Plan& plan = there != nullptr && there->plan.steps() ? there->plan : plan_;
  const bool is_double = plan.any_double();
  if (&plan != &plan_) {
    measuring_ = {true,           extras_->order,    is_double,
                  extras_->clips, extras_->max_norm, extras_->skips};
    return true;
  }
  Measured measured = plan.measure(extras_->order);
  const double norm = norm_of(measured, extras_->order, scaling_.scale, is_double);
  findings_.found(norm, is_double);
  if (extras_->raises && !std::isfinite(norm)) {
    static auto& raise = *new PyCall("fastsgd._norm", "raise_if_nonfinite");
    const Ref tensor = Ref::steal(checked(THPVariable_Wrap(findings_.grad_norm())));
    const bool is_two = extras_->order == Order::kTwo;
    raise(tensor.get(), Ref::steal(checked(PyFloat_FromDouble(is_two ? 2 : INFINITY))).get());
  }
  factor_ = clip_factor(norm, is_double, extras_->max_norm);
  const bool skips = extras_->skips && measured.not_finite != 0;
  if (skips) ++findings_.skipped;
  return !skips;
}

// What a device has counted; waits for it. In a graph there is nothing to wait for.
std::int64_t Walker::read(cuda::Device& device, const std::int64_t* there) {
  TORCH_CHECK(!device.captures(),
              "what a device has counted is asked for, as by skipped_steps, and a graph is being "
              "captured, which has counted nothing yet. Ask before or after the capture.");
  const WithoutGil guard(true);  // the device may wait for what another thread is to ask of it
  return device.read(there);
}

std::int64_t Walker::skipped_there() const {
  std::int64_t skipped = 0;
  const auto& works = devices_.all();
  for (std::size_t i = 0; i < works.size(); ++i) {  // to which another thread may add
    cuda::Device& device = works[i]->device();
    if (const std::int64_t* there = works[i]->skipped()) skipped += read(device, there);
  }
  return skipped;
}

// --- around the rule ----------------------------------------------------------------------------

// But for what only a device knows.
Around Walker::around() const {
  Around around;
  around.grad_scale = scaling_.scale;
  around.unscales = scaling_.unscale;
  around.keeps_unscaled = scaling_.unscale && !extras_->any;
  around.clips = (extras_->clips || extras_->has_factor) && factor_ != 1;
  around.factor = factor_;
  around.bounds = extras_->bounds;
  around.bound = extras_->bound;
  around.averages = extras_->averages;
  around.weight = 1 - decay_;
  around.starts = starts_;
  around.wide = extras_->wide;
  around.clears = clears_in_pass_;
  return around;
}

// Clears the gradients, which the kernels have set to zero if they stepped.
void Walker::clear(PyObject* groups, bool stepped) {
  const bool to_none = extras_->clear == Extras::Clear::kToNone;
  if (!to_none && stepped && clears_in_pass_) {
    for (const at::Tensor& grad : in_graphs_) GradReset::detach(grad);
    return;
  }
  std::vector<Ref> others;
  if (!grad_reset_.reset(groups, to_none, others)) return;
  static auto& reset_grad = *new PyCall("fastsgd._optimizer", "_reset_grad");
  for (const Ref& other : others) reset_grad(other.get(), to_none ? Py_True : Py_False);
}

// --- averages -----------------------------------------------------------------------------------

// Asks for the decay of this step, before anything is planned: it runs Python code, which may do
// whatever it likes.
void Walker::ask_schedule(PyObject* attributes) {
  const Ref schedule = Ref::borrow(extras_->schedule);
  const Averaged averaged = extras_reader_.averaged(attributes);
  const c10::TensorImpl* there = averaged.there.unsafeGetTensorImpl();
  cuda::DeviceWork* work = averaged.there.defined() ? devices_.find(*there) : nullptr;
  TORCH_CHECK(work == nullptr || !work->device().captures(),
              "ema_decay is a schedule, and a graph is being captured, in which one decay would be "
              "repeated. Set ema_decay to a number before.");
  const bool is_known = work != nullptr && findings_.averages_of == there && !work->captured();
  averages_ = is_known ? findings_.averages : averages_so_far(averaged);
  asked_ = schedule.get();
  if (std::exchange(findings_.asked, nullptr) == asked_ && findings_.asked_for == averages_ + 1) {
    return;
  }
  findings_.decay = decay_of(schedule.get(), averages_ + 1);
  findings_.asked_for = averages_ + 1;
  if (is_known) {  // it may have stepped
    const bool still = findings_.averages_of == there;
    averages_ = still ? findings_.averages : averages_so_far(averaged);
  }
}

// Waits for a device that counts them.
std::int64_t Walker::averages_so_far(const Averaged& averaged) {
  const at::Tensor& there = averaged.there;
  if (!there.defined()) return averaged.count;
  const bool is_one = there.scalar_type() == at::kLong && there.numel() == 1;
  cuda::DeviceWork* work = is_one ? devices_.find(*there.unsafeGetTensorImpl()) : nullptr;
  if (work != nullptr) {
    // On whatever stream it was counted, which the current one need not wait for.
    return read(work->device(), static_cast<const std::int64_t*>(there.const_data_ptr()));
  }
  const WithoutGil guard(true);
  return there.item<std::int64_t>();
}

// The same of a step that is planned already.
std::int64_t Walker::averages_before(const Averaged& averaged) {
  if (extras_->schedule != nullptr && averaged.there.defined()) return averages_;
  retain();
  return averages_so_far(averaged);
}

// Finds out how many averages there were, and where they are counted. A device that steps alone
// counts by itself: it may skip a step, or repeat one in a graph.
void Walker::begin_average(Averaged& averaged, cuda::DeviceWork* there) {
  if (there != nullptr) return bring_count(averaged, *there);
  if (averaged.there.defined()) averaged.count = averages_before(averaged);
  starts_ = averaged.count == 0;
}

// Whether a device has the count already; throws where it is to be brought there in a graph.
bool Walker::count_is_there(const at::Tensor& count, cuda::Device& device) {
  const bool is_there = count.defined() && count.numel() == 1 && count.scalar_type() == at::kLong &&
                        count.device() == device.tensors();
  TORCH_CHECK(is_there || !device.captures(),
              "the averages of ema_decay begin with this step, and a graph is being captured. Take "
              "one step before the capture.");
  return is_there;
}

void Walker::bring_count(Averaged& averaged, cuda::DeviceWork& there) {
  cuda::Device& device = there.device();
  if (!count_is_there(averaged.there, device)) {
    retain();  // a new tensor's object may collect garbage
    averaged.count = averages_before(averaged);
    averaged.there = at::full({}, averaged.count, at::device(device.tensors()).dtype(at::kLong));
  } else if (extras_->schedule != nullptr) {
    averaged.count = averages_;
  }
  if (device.captures()) {  // the graph counts on, whatever becomes of the optimizer
    static auto& kept = *new std::vector<at::Tensor>;
    kept.push_back(averaged.there);
  }
}

// Enters one more. A device's count is known here only where nothing can skip the step. Once it is
// a tensor it stays that tensor, on which a graph may count.
void Walker::end_average(PyObject* attributes, Averaged& averaged, bool counts_there) {
  ++averaged.count;
  if (averaged.there.defined() && !counts_there) {
    const c10::InferenceMode guard;  // it may have been made in that mode
    averaged.there.fill_(averaged.count);
  }
  const bool may_skip = scaling_.found_inf_at != nullptr || measuring_.skips;
  const bool is_known = averaged.there.defined() && extras_->schedule != nullptr && !may_skip;
  findings_.averages = averaged.count;
  findings_.averages_of = is_known ? averaged.there.unsafeGetTensorImpl() : nullptr;
  extras_reader_.keep(attributes, averaged);
}

}  // namespace fastsgd
