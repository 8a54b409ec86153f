#include "modes.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <Python.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "pydict.h"
#include "pytensor.h"

namespace fastsgd {
namespace {

PyTypeObject* device_context = nullptr;  // kept for good

// The mode that set_default_device leaves on: it says where new tensors are to be. On the CPU that
// is where a step's are.
bool only_means_cpu(PyObject* mode) {
  static DictKey& device = *new DictKey("device");
  if (Py_TYPE(mode) != device_context) return false;
  const Ref attributes = Ref::steal(checked(PyObject_GenericGetDict(mode, nullptr)));
  PyObject* value = device.in(attributes.get());
  return value != nullptr && THPDevice_Check(value) &&
         reinterpret_cast<THPDevice*>(value)->device.is_cpu();
}

bool any_function_mode() {
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (std::int64_t i = 0; i < Modes::stack_len(); ++i) {
    if (!only_means_cpu(Modes::get_stack_at(i)->ptr(getPyInterpreter()))) return true;
  }
  return false;
}

}  // namespace

bool any_mode() {
  constexpr auto kTransform = c10::DispatchKey::FuncTorchDynamicLayerFrontMode;  // torch.func's
  return c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         c10::impl::tls_is_dispatch_key_included(kTransform) || any_function_mode() ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;  // tangents move too
}

void learn_modes() {
  const Ref module = Ref::steal(checked(PyImport_ImportModule("torch.utils._device")));
  PyObject* type = checked(PyObject_GetAttrString(module.get(), "DeviceContext"));
  device_context = reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace fastsgd
