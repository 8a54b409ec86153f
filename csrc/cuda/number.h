// The arithmetic of number.h, on the device: what a rule computes its scalars with there.
#pragma once

#include <math.h>

#include "cuda/table.h"
#include "lane.h"

namespace fastsgd::cuda {

// A hyper-parameter: a Python float, or a tensor of one element, which rounds every result to its
// dtype. Floats are computed in double and rounded once more: for + - * / that is exact.
struct Number {
  enum Kind : std::uint8_t { kPython, kFloat, kDouble };
  double value;
  Kind kind;

  FASTSGD_LANE Number() : value(0), kind(kPython) {}
  FASTSGD_LANE Number(double x) : value(x), kind(kPython) {}  // NOLINT: as in Python, 1 - x
  FASTSGD_LANE Number(double x, Kind of)
      : value(of == kFloat ? static_cast<float>(x) : x), kind(of) {}
};

// The dtype of a result, for which operands are rounded to it.
FASTSGD_LANE Number::Kind promoted(const Number& a, const Number& b) {
  return a.kind > b.kind ? a.kind : b.kind;
}
FASTSGD_LANE double as(const Number& a, Number::Kind kind) { return Number(a.value, kind).value; }

template <class Operate>
FASTSGD_LANE Number operate(const Number& a, const Number& b, Operate operate) {
  const Number::Kind kind = promoted(a, b);
  return {operate(as(a, kind), as(b, kind)), kind};
}

FASTSGD_LANE Number operator+(const Number& a, const Number& b) {
  return operate(a, b, [](double x, double y) { return x + y; });
}
FASTSGD_LANE Number operator-(const Number& a, const Number& b) {
  return operate(a, b, [](double x, double y) { return x - y; });
}
FASTSGD_LANE Number operator*(const Number& a, const Number& b) {
  return operate(a, b, [](double x, double y) { return x * y; });
}
// A Python number over a tensor is the tensor's reciprocal times the number, as in torch.
FASTSGD_LANE Number operator/(const Number& a, const Number& b) {
  if (a.kind == Number::kPython && b.kind != Number::kPython) {
    return Number(1 / b.value, b.kind) * a;
  }
  return operate(a, b, [](double x, double y) { return x / y; });
}

// A power to a whole number from 1 on, by squares kept in two doubles each: the nearest double but
// for one in a thousand. The host's library is as good, and a device's a unit off now and then.
FASTSGD_LANE double whole_power(double base, double exponent) {
  double high = 1, low = 0, square = base, rest = 0;
  for (auto n = static_cast<std::int64_t>(exponent);;) {
    if (n & 1) {
      const double product = high * square;
      const double error = lane::fma(high, square, -product) + (high * rest + low * square);
      high = product + error;
      low = error - (high - product);
    }
    if ((n >>= 1) == 0) return high;
    const double product = square * square;
    const double error = lane::fma(square, square, -product) + 2 * square * rest;
    square = product + error;
    rest = error - (square - product);
  }
}
FASTSGD_LANE double power(double base, double exponent) {
  if (exponent == 0.5) return lane::sqrt(base);
  if (exponent >= 1 && exponent < 0x1p53 && exponent == ::floor(exponent)) {
    const double power = whole_power(base, exponent);
    if (::isfinite(power)) return power;
  }
  return ::pow(base, exponent);
}
FASTSGD_LANE Number pow(const Number& base, double exponent) {
  return {power(base.value, exponent), base.kind};
}

// A hyper-parameter as the table has it.
FASTSGD_LANE Number read(const Hypers& hypers, int i) {
  const auto& cell = hypers.cell[i];
  switch (hypers.kind[i]) {
    case Hypers::kPython:
      return cell.value;
    case Hypers::kFloat:
      return {cell.value, Number::kFloat};
    case Hypers::kDouble:
      return {cell.value, Number::kDouble};
    case Hypers::kFloatAt:
      return {*static_cast<const float*>(cell.address), Number::kFloat};
    case Hypers::kDoubleAt:
      break;
  }
  return {*static_cast<const double*>(cell.address), Number::kDouble};
}

}  // namespace fastsgd::cuda
