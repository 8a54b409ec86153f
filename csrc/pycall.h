// What Python says and does for C++ too: functions of the package's modules.
#pragma once

#include <Python.h>
#include <torch/csrc/Exceptions.h>

#include "pydict.h"
#include "pytensor.h"

namespace fastsgd {

// A function, imported at its first call.
class PyCall {
 public:
  PyCall(const char* module, const char* name) : module_(module), name_(name) {}

  // Throws what it raises.
  template <class... Argument>
  Ref operator()(Argument*... arguments) {
    if (!function_) {
      const Ref module = Ref::steal(checked(PyImport_ImportModule(module_)));
      function_ = Ref::steal(checked(PyObject_GetAttrString(module.get(), name_)));
    }
    return Ref::steal(
        checked(PyObject_CallFunctionObjArgs(function_.get(), arguments..., nullptr)));
  }

 private:
  const char *module_, *name_;
  Ref function_;
};

}  // namespace fastsgd
