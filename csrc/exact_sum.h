// A sum of doubles in which nothing is rounded, so that their order does not show in it. It is kept
// in fixed point: every finite double is a whole multiple of 2^-1074, below 2^1024.
#pragma once

#include <cstdint>
#include <cstring>

#include "lane.h"

namespace fastsgd {

struct ExactSum {
  static constexpr int kPlaces = 68;  // of 32 binary digits, and what carries beyond the last
  static constexpr unsigned kInfinite = 1, kNan = 2;

  std::int64_t place[kPlaces];
  unsigned special;  // what else was added

  // At most 2^31 times.
  FASTSGD_LANE void add(double x) {
    std::uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const std::int64_t sign = static_cast<std::int64_t>(bits) >> 63;  // 0 or -1
    const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
    std::uint64_t digits = bits & 0xfffffffffffff;
    if (exponent == 0x7ff) {
      special |= digits != 0 ? kNan : kInfinite;
      return;
    }
    if (exponent != 0) digits |= std::uint64_t{1} << 52;
    const int position = exponent == 0 ? 0 : exponent - 1, shift = position % 32;
    const std::uint64_t low = digits << shift, high = digits >> 1 >> (63 - shift);
    const auto put = [&](int at, std::uint64_t part) {
      place[at] += (static_cast<std::int64_t>(part) ^ sign) - sign;
    };
    put(position / 32, low & 0xffffffff);
    put(position / 32 + 1, low >> 32);
    put(position / 32 + 2, high);
  }
  FASTSGD_LANE void add(const ExactSum& other) {
    for (int i = 0; i < kPlaces; ++i) place[i] += other.place[i];
    special |= other.special;
  }

  // The sum, which is not negative, times 2^shift as a double: the nearest, or next to it where two
  // are about as near. Leaves the places carried.
  FASTSGD_LANE double value(int shift = 0) {
    if ((special & kNan) != 0) return __builtin_nan("");
    if ((special & kInfinite) != 0) return __builtin_inf();
    int top = 0;
    for (int i = 0; i + 1 < kPlaces; ++i) {
      place[i + 1] += place[i] >> 32;
      place[i] &= 0xffffffff;
      if (place[i + 1] != 0) top = i + 1;
    }
    const auto digits = [this](int at) { return at < 0 ? 0 : static_cast<double>(place[at]); };
    const auto two = [&](int at) { return digits(at) * 0x1p32 + digits(at - 1); };
    const double leading = two(top) + digits(top - 2) * 0x1p-32;
    const int exponent = (top - 1) * 32 - 1074 + shift;
    return exponent < kFarBelow ? 0 : scaled(leading, exponent);
  }

 private:
  static constexpr int kFarBelow = -1900;  // 2^96 times such a power of 2 is no double but 0

  // x * 2^exponent, in two steps as a factor may be no number.
  FASTSGD_LANE static double scaled(double x, int exponent) {
    const int half = exponent / 2;
    return x * power_of_2(half) * power_of_2(exponent - half);
  }
  FASTSGD_LANE static double power_of_2(int exponent) {
    const std::uint64_t bits = static_cast<std::uint64_t>(exponent + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
  }
};

}  // namespace fastsgd
