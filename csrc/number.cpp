#include "number.h"

#include <ATen/ops/add.h>
#include <ATen/ops/div.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sub.h>
#include <Python.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>

#include <cmath>

namespace fastsgd {
namespace {

// Tensors are computed with by torch's own operators: what they round, and how, is theirs to say.
at::Tensor tensor(const Number& number) {
  return at::scalar_tensor(number.value, static_cast<at::ScalarType>(number.dtype));
}
Number number(const at::Tensor& tensor) {
  return {tensor.item<double>(), static_cast<std::int64_t>(tensor.scalar_type())};
}

}  // namespace

Number operator+(const Number& a, const Number& b) {
  if (a.is_tensor() && b.is_tensor()) return number(at::add(tensor(a), tensor(b)));
  if (a.is_tensor()) return number(at::add(tensor(a), b.value));
  if (b.is_tensor()) return number(at::add(tensor(b), a.value));
  return a.value + b.value;
}

Number operator-(const Number& a, const Number& b) {
  if (a.is_tensor() && b.is_tensor()) return number(at::sub(tensor(a), tensor(b)));
  if (a.is_tensor()) return number(at::sub(tensor(a), b.value));
  if (b.is_tensor()) return number(at::rsub(tensor(b), a.value));
  return a.value - b.value;
}

Number operator*(const Number& a, const Number& b) {
  if (a.is_tensor() && b.is_tensor()) return number(at::mul(tensor(a), tensor(b)));
  if (a.is_tensor()) return number(at::mul(tensor(a), b.value));
  if (b.is_tensor()) return number(at::mul(tensor(b), a.value));
  return a.value * b.value;
}

Number operator/(const Number& a, const Number& b) {
  if (a.is_tensor() && b.is_tensor()) return number(at::div(tensor(a), tensor(b)));
  if (a.is_tensor()) return number(at::div(tensor(a), b.value));
  if (b.is_tensor()) return number(at::mul(at::reciprocal(tensor(b)), a.value));
  if (b.value == 0) {
    PyErr_SetString(PyExc_ZeroDivisionError, "float division by zero");
    throw python_error();
  }
  return a.value / b.value;
}

Number pow(const Number& base, double exponent) {
  if (base.is_tensor()) return number(at::pow(tensor(base), exponent));
  const double power = std::pow(base.value, exponent);
  if (std::isinf(power) && std::isfinite(base.value) && std::isfinite(exponent)) {
    PyErr_SetString(base.value == 0 ? PyExc_ZeroDivisionError : PyExc_OverflowError,
                    base.value == 0 ? "0.0 cannot be raised to a negative power"
                                    : "(34, 'Numerical result out of range')");
    throw python_error();
  }
  // Python's result is complex, which no tensor of real numbers takes.
  TORCH_CHECK(!(base.value < 0 && std::isnan(power)), base.value, " to the power of ", exponent,
              " is no real number. Is a parameter's step negative, or a beta greater than 1?");
  return power;
}

}  // namespace fastsgd
