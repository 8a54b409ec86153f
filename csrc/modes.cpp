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

using Modes = at::impl::PythonTorchFunctionTLS;

PyObject* function_mode(std::int64_t number) {
  return Modes::get_stack_at(number)->ptr(getPyInterpreter());
}

// The mode that set_default_device leaves on, and that a device is in a with statement: it says
// where new tensors are to be, and leaves all else alone.
bool is_default_device(PyObject* mode) { return Py_TYPE(mode) == device_context; }

bool means_cpu(PyObject* mode) {
  static DictKey& device = *new DictKey("device");
  const Ref attributes = Ref::steal(checked(PyObject_GenericGetDict(mode, nullptr)));
  PyObject* value = device.in(attributes.get());
  return value != nullptr && THPDevice_Check(value) &&
         reinterpret_cast<THPDevice*>(value)->device.is_cpu();
}

bool any_function_mode() {
  for (std::int64_t i = 0; i < Modes::stack_len(); ++i) {
    if (!is_default_device(function_mode(i))) return true;
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

bool default_device_is_another() {
  for (std::int64_t i = Modes::stack_len(); i-- > 0;) {  // the innermost counts
    if (is_default_device(function_mode(i))) return !means_cpu(function_mode(i));
  }
  return false;
}

void learn_modes() {
  const Ref module = Ref::steal(checked(PyImport_ImportModule("torch.utils._device")));
  PyObject* type = checked(PyObject_GetAttrString(module.get(), "DeviceContext"));
  device_context = reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace fastsgd
