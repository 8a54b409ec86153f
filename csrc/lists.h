// What is done to lists of tensors at once, outside of a step. Tensors that are not plain are left,
// and those that are not on the CPU, unless it is said otherwise: each function returns their
// numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <cstdint>
#include <vector>

namespace fastsgd {

using Left = std::vector<std::int64_t>;

struct NormOfAll {
  double value = 0;
  std::int64_t count = 0;   // of tensors that it is of
  bool any_double = false;  // among them
  Left left;
};

// The norm of a list's tensors together, of order infinity or 2, in double; or of their gradients,
// where there are any.
NormOfAll norm_of_all(PyObject* list, bool of_grads, bool infinity);

// Multiplies each, or each gradient, by a factor in place.
Left scale_all(PyObject* list, bool of_grads, double factor);

// Clips the gradients of a list by the norm of all of them, of order infinity or 2, on the device
// where they lie, and returns that norm; undefined, and nothing done, where they are not all plain
// ones on one device. If the norm is not finite and that `raises`, they stay as they are.
at::Tensor clip_there(PyObject* list, double max_norm, bool infinity, bool raises);

// Exchanges what each parameter holds with what its average does, on any device.
Left exchange_all(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& averages);

// Where the tensors of a list lie, each device once. Python code runs only for those whose class
// says where they lie.
std::vector<c10::Device> devices_of(PyObject* list);

}  // namespace fastsgd
