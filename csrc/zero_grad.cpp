// The part of the walk that resets gradients.
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "prefetch.h"
#include "pytensor.h"
#include "walk.h"

namespace fastsgd {
namespace {

// The gradient of the parameter that stands at `i`; null where it has none.
at::Tensor* grad_at(PyObject* params, Py_ssize_t i) {
  if (i >= PySequence_Fast_GET_SIZE(params)) return nullptr;
  PyObject* param = PySequence_Fast_GET_ITEM(params, i);
  if (!exact_tensor(param)) return nullptr;
  at::Tensor* grad = grad_slot(*impl_of(param));
  return grad != nullptr && grad->defined() ? grad : nullptr;
}

// Gradients are new at each iteration, so there is nothing to remember of them: they are looked up
// ahead of their turn, in stages. Each reads what the one before has fetched, some parameters
// later.
FASTSGD_PREFETCHING void fetch_grads_ahead(PyObject* params, Py_ssize_t i) {
  constexpr auto kStage = static_cast<Py_ssize_t>(kAhead);
  const Py_ssize_t end = PySequence_Fast_GET_SIZE(params);
  const auto impl_at = [&](Py_ssize_t at) -> const c10::TensorImpl* {
    if (at >= end) return nullptr;
    PyObject* param = PySequence_Fast_GET_ITEM(params, at);
    return exact_tensor(param) ? impl_of(param) : nullptr;
  };
  if (i + 5 * kStage < end) prefetch(PySequence_Fast_GET_ITEM(params, i + 5 * kStage));
  if (const auto* param = impl_at(i + 4 * kStage)) prefetch(param);
  if (const auto* param = impl_at(i + 3 * kStage)) prefetch(grad_slot(*param));
  if (const at::Tensor* grad = grad_at(params, i + 2 * kStage)) {
    prefetch<sizeof(c10::TensorImpl) + 48>(grad->unsafeGetTensorImpl());
  }
  if (const at::Tensor* grad = grad_at(params, i + kStage)) {
    const c10::TensorImpl& tensor = *grad->unsafeGetTensorImpl();
    prefetch<sizeof(c10::StorageImpl) + 32>(tensor.unsafe_storage().unsafeGetStorageImpl());
    prefetch<48>(Fields::counter(tensor));
  }
  if (const at::Tensor* grad = grad_at(params, i + kStage / 2)) {
    const c10::TensorImpl& tensor = *grad->unsafeGetTensorImpl();
    if (auto* st = tensor.unsafe_storage().unsafeGetStorageImpl())
      prefetch<96>((const char*)st->data() - 16);
  }
}

}  // namespace

bool Walker::zero_grad(PyObject* optimizer, bool set_to_none, std::vector<Ref>& others) {
  const Busy guard(busy);
  const Cleanup cleanup{*this};
  zero_plan_.begin();
  const Ref kept = Ref::borrow(param_groups_.optional_in(attributes_of(optimizer)));
  PyObject* groups = kept.get();
  if (groups == nullptr || !PyList_Check(groups)) return false;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    if (!exact_dict(PyList_GET_ITEM(groups, g))) return false;
  }
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    const Ref params = Ref::steal(checked(PySequence_Fast(
        params_.needed_in(PyList_GET_ITEM(groups, g)), "a group's params must be a sequence")));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.get()); ++i) {
      fetch_grads_ahead(params.get(), i);
      PyObject* param = PySequence_Fast_GET_ITEM(params.get(), i);
      if (!exact_tensor(param)) {
        others.push_back(Ref::borrow(param));
      } else if (at::Tensor* grad = grad_at(params.get(), i)) {
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
