// The arithmetic that stock does with hyper-parameters, once a step.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace fastsgd {

// A hyper-parameter: a Python float; or a tensor of one element, which rounds every result to its
// dtype. Scalars of a step are computed with these operators where stock's are, and with the plain
// `value` where stock has no arithmetic.
struct Number {
  static constexpr std::int64_t kPython = -1, kThere = 1 << 16;

  double value = 0;
  std::int64_t dtype = kPython;  // of a tensor: torch's number for it

  constexpr Number() = default;
  constexpr Number(double x) : value(x) {}  // NOLINT: as in Python, 1 - x
  constexpr Number(double x, std::int64_t tensor_dtype) : value(x), dtype(tensor_dtype) {}

  // A tensor's value that only another device reads: its address there, in place of the value. It
  // is taken for some number that is not 0.
  static Number at(const void* address, std::int64_t tensor_dtype) {
    return {std::bit_cast<double>(address), tensor_dtype + kThere};
  }
  bool is_there() const { return dtype >= kThere; }
  const void* address() const { return std::bit_cast<const void*>(value); }
  std::int64_t tensor_dtype() const { return is_there() ? dtype - kThere : dtype; }

  bool is_tensor() const { return dtype != kPython; }
};

// Its magnitude; 0 for an infinity or a NaN.
constexpr double finite_magnitude(double x) {
  const double magnitude = x < 0 ? -x : x;
  return magnitude <= std::numeric_limits<double>::max() ? magnitude : 0;
}

Number operator+(const Number& a, const Number& b);
Number operator-(const Number& a, const Number& b);
Number operator*(const Number& a, const Number& b);
// Throws Python's ZeroDivisionError where Python would.
Number operator/(const Number& a, const Number& b);
inline Number operator-(const Number& a) { return {-a.value, a.dtype}; }
// Throws Python's OverflowError where Python would.
Number pow(const Number& base, double exponent);

}  // namespace fastsgd
