// The arithmetic that stock does with hyper-parameters, once a step.
#pragma once

#include <cstdint>

namespace fastsgd {

// A hyper-parameter: a Python float; or a tensor of one element, which rounds every result to its
// dtype. Scalars of a step are computed with these operators where stock's are, and with the plain
// `value` where stock has no arithmetic.
struct Number {
  static constexpr std::int64_t kPython = -1;

  double value = 0;
  std::int64_t dtype = kPython;  // of a tensor: torch's number for it

  constexpr Number() = default;
  constexpr Number(double x) : value(x) {}  // NOLINT: as in Python, 1 - x
  constexpr Number(double x, std::int64_t tensor_dtype) : value(x), dtype(tensor_dtype) {}

  bool is_tensor() const { return dtype != kPython; }
};

Number operator+(const Number& a, const Number& b);
Number operator-(const Number& a, const Number& b);
Number operator*(const Number& a, const Number& b);
// Throws Python's ZeroDivisionError where Python would.
Number operator/(const Number& a, const Number& b);
inline Number operator-(const Number& a) { return {-a.value, a.dtype}; }
// Throws Python's OverflowError where Python would.
Number pow(const Number& base, double exponent);

}  // namespace fastsgd
