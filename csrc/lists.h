// What is done to lists of tensors at once, outside of a step. Tensors that are not plain ones on
// the CPU are left: each function returns their numbers.
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

// Exchanges what each tensor of one list holds with what that of the other does.
Left exchange_all(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b);

}  // namespace fastsgd
