#include "zero_grad.h"

#include <c10/core/InferenceMode.h>

#include <utility>

#include "cuda/emulation.h"
#include "lookahead.h"
#include "modes.h"
#include "prefetch.h"
#include "pytensor.h"

namespace fastsgd {
namespace {

// In the order of the stages, from far to near.
FASTSGD_PREFETCHING void fetch_ahead(PyObject* params, Py_ssize_t turn, bool to_free) {
  constexpr auto kStage = static_cast<Py_ssize_t>(kAhead);
  const Lookahead ahead(params, turn);
  ahead.fetch_object(5 * kStage);
  ahead.fetch_param(4 * kStage);
  ahead.fetch_grad_slot(3 * kStage);
  if (to_free) {
    ahead.fetch_grad_to_free(2 * kStage);
    ahead.fetch_parts_to_free(kStage);
    ahead.fetch_memory_to_free(kStage / 2);
  } else {
    ahead.fetch_grad(2 * kStage);
    ahead.fetch_grad_storage(kStage);
  }
}

}  // namespace

bool GradReset::reset(PyObject* groups, bool set_to_none, std::vector<Ref>& others) {
  if (!set_to_none) plan_.begin();
  for (const auto& work : devices_.all()) work->begin();
  cpu_keys_ = cuda::emulated() ? 0 : plain().keys;
  const bool directly = !any_mode();
  if (groups == nullptr || !PyList_CheckExact(groups)) return false;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* dict = PyList_GET_ITEM(groups, g);
    if (!exact_dict(dict)) return false;
    PyObject* params = params_.needed_in(dict);
    if (!PyList_CheckExact(params) && !PyTuple_CheckExact(params)) return false;
  }
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    const Ref params =
        Ref::steal(checked(PySequence_Fast(params_.needed_in(PyList_GET_ITEM(groups, g)),
                                           "a group's params must be a list or a tuple")));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.get()); ++i) {
      fetch_ahead(params.get(), i, set_to_none);
      PyObject* param = PySequence_Fast_GET_ITEM(params.get(), i);
      if (!exact_tensor(param)) {
        others.push_back(Ref::borrow(param));
        continue;
      }
      at::Tensor* grad = grad_slot(*impl_of(param));
      if (grad == nullptr || !grad->defined()) continue;
      if (set_to_none) {
        // Its end may run Python code (a weak reference's, say), which then finds it gone already.
        const at::Tensor dropped = std::exchange(*grad, at::Tensor());
        continue;
      }
      PyObject* object = object_of(*grad->unsafeGetTensorImpl());
      if (object != nullptr && !exact_tensor(object)) {  // it has a zero_ of its own
        others.push_back(Ref::borrow(param));
      } else {
        zero({g, i}, *grad, directly);
      }
    }
  }
  if (set_to_none) return true;
  const std::vector<cuda::DeviceWork*> works = devices_.needed();
  for (cuda::DeviceWork* work : works) work->prepare();
  plan_.retain_for_kernels();
  for (cuda::DeviceWork* work : works) work->launch();
  plan_.run({}, false);
  return true;
}

// False where memory has gaps, or is not plain.
bool GradReset::add_zero(const at::Tensor& grad) {
  c10::TensorImpl& tensor = *grad.unsafeGetTensorImpl();
  if (Fields::keys(tensor) == cpu_keys_) [[likely]]
    return plan_.add_single(grad, kZero);
  auto* work = devices_.find(tensor);
  return work != nullptr && work->plan.add_single(grad, kZero);
}

void GradReset::detach(const at::Tensor& grad) {
  if (!grad.requires_grad()) return;
  if (grad.grad_fn() != nullptr) {
    grad.detach_();
  } else {
    grad.set_requires_grad(false);
  }
}

void GradReset::zero(Place place, const at::Tensor& slot, bool directly) {
  if (directly && !slot.requires_grad() && !slot.is_inference() && add_zero(slot)) return;
  // What follows may run Python code: the end of a graph, a dispatched operator.
  plan_.retain();
  for (const auto& work : devices_.all()) work->plan.retain();
  const at::Tensor grad = slot;
  const std::string why = why_not_zeroed(grad);
  TORCH_CHECK(why.empty(), at_place(place), ": its grad ", why, ": set it to None instead.");
  detach(grad);
  if (directly && add_zero(grad)) return;
  if (!has_memory(*grad.unsafeGetTensorImpl())) {
    storage_too_small(at_place(place) + ": the storage of its grad", *grad.unsafeGetTensorImpl());
  }
  grad.zero_();
}

void GradReset::release() {
  plan_.release();
  for (const auto& work : devices_.all()) work->plan.release();
}

}  // namespace fastsgd
