// Tensors as Python holds them.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "plain.h"

namespace fastsgd {

inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw python_error();
  return object;
}

inline bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw python_error();
  return truth != 0;
}

// Whether a class is one of parameters that changes nothing of what a tensor does or has, and so
// means by its data what Parameter means. Runs no Python code.
bool is_plain_parameter_class(PyTypeObject* type);

// A Tensor or a Parameter, and no subclass that could mean something else by its data.
inline bool exact_tensor(PyObject* object) {
  if (THPVariable_CheckExact(object)) [[likely]]
    return true;
  return is_plain_parameter_class(Py_TYPE(object));
}

// A tensor of whatever class, by its type alone: THPVariable_Check may ask the object, in Python.
inline bool any_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass)) != 0;
}

inline const at::Tensor& tensor_of(PyObject* object) { return THPVariable_Unpack(object); }

inline c10::TensorImpl* impl_of(PyObject* object) {
  return tensor_of(object).unsafeGetTensorImpl();
}

// Where a tensor keeps its gradient; null where it has no place for one.
inline at::Tensor* grad_slot(const c10::TensorImpl& tensor) {
  auto* meta = static_cast<torch::autograd::AutogradMeta*>(Fields::autograd(tensor));
  return meta == nullptr ? nullptr : &meta->grad_;
}

// The Python object of a tensor that C++ holds; null where it has none. Torch 2.11 called it
// otherwise.
template <class Slot>
PyObject* object_in(const Slot& slot) {
  if constexpr (requires { slot.load_pyobj(); }) {
    return slot.load_pyobj();
  } else {
    return slot.check_pyobj().value_or(nullptr);
  }
}

inline PyObject* object_of(c10::TensorImpl& tensor) { return object_in(*tensor.pyobj_slot()); }

}  // namespace fastsgd
