// The part of the kernels that measures gradients, in double. Squares of float32 are exact there;
// those of float64 are rounded once, and what their sum loses is kept apart. Elements are dealt out
// to kMeasureLanes lanes, so that the width of a register does not show in the sum.
#pragma once

#include "cpu/simd.h"
#include "norm.h"
#include "prefetch.h"

namespace fastsgd {
namespace {

constexpr int kDoubles = sizeof(DoubleRegister) / sizeof(double);
constexpr int kParts = kMeasureLanes / kDoubles;  // the registers that hold all lanes

// Calls f(i) for each of those registers. Not in a loop, which GCC would unroll too late to keep
// them out of memory.
template <int kPart = 0, class F>
FASTSGD_LANE void each_part(const F& f) {
  if constexpr (kPart < kParts) {
    f(kPart);
    each_part<kPart + 1>(f);
  }
}

// How far ahead elements are fetched, into the second-level cache: a kilobyte. Hardware would not
// be late either, but it stops at the end of each page.
template <class T>
constexpr std::int64_t kFetched = 1024 / static_cast<std::int64_t>(sizeof(T));

// Up to which element something is worth fetching: a whole piece is followed by the next of its
// gradient, but for the last.
template <class T>
FASTSGD_LANE std::int64_t fetching_of(std::int64_t count) {
  return count == kPiece ? kPiece : count - kFetched<T>;
}
// The lines that are that far ahead of `kCount` elements.
template <std::int64_t kCount, class T>
FASTSGD_LANE void fetch_ahead(const T* from) {
  constexpr std::int64_t kOfLine = kCacheLine / sizeof(T);
  for (std::int64_t i = 0; i < kCount; i += kOfLine) {
    prefetch_to_second_level(from + i + kFetched<T>);
  }
}

// Elements in double.
struct Elements {
  DoubleRegister part[kParts];
};
template <class T>
FASTSGD_LANE Elements elements_of(const T* from) {
  if constexpr (sizeof(T) < sizeof(float)) {
    constexpr int kFloats = sizeof(FloatRegister) / sizeof(float);
    float floats[kMeasureLanes];
    for (int i = 0; i < kMeasureLanes; i += kFloats) {
      store(floats + i, load<FloatRegister>(from + i));
    }
    return elements_of(floats);
  } else {
    Elements elements;
    each_part([&](int i) { elements.part[i] = load_doubles(from + i * kDoubles); });
    return elements;
  }
}

// Sums of lanes, and what they could not take: added up in one order for registers of any width.
template <bool kRest>
struct Sums {
  DoubleRegister sum[kParts], rest[kParts];

  FASTSGD_LANE Sums() {
    each_part([&](int i) { sum[i] = rest[i] = DoubleRegister{}; });
  }
  FASTSGD_LANE void add_squares(const Elements& elements) {
    each_part([&](int i) {
      const DoubleRegister x = elements.part[i];
      if constexpr (kRest) {
        add(x * x, sum[i], rest[i]);
      } else {
        sum[i] = lane::fma(x, x, sum[i]);  // the square is exact, whether it is fused or not
      }
    });
  }
  // Halves the lanes until one is left: registers first, then what is in the last.
  FASTSGD_LANE PieceMeasured total() {
    halve_parts<kParts / 2>();
    double sums[kDoubles], rests[kDoubles];
    std::memcpy(sums, sum, sizeof(sums));
    std::memcpy(rests, rest, sizeof(rests));
#pragma GCC unroll 8
    for (int half = kDoubles / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) join(sums[i], rests[i], sums[i + half], rests[i + half]);
    }
    return {sums[0], kRest ? rests[0] : 0, false, Scaled::kNot};
  }

 private:
  template <int kHalf>
  FASTSGD_LANE void halve_parts() {
    if constexpr (kHalf > 0) {
      each_part([&](int i) {
        if (i < kHalf) join(sum[i], rest[i], sum[i + kHalf], rest[i + kHalf]);
      });
      halve_parts<kHalf / 2>();
    }
  }
  template <class L>
  FASTSGD_LANE static void add(const L& x, L& sum, L& rest) {
    if constexpr (kRest) {
      add_keeping_rest(x, sum, rest);
    } else {
      sum = sum + x;
    }
  }
  template <class L>
  FASTSGD_LANE static void join(L& sum, L& rest, const L& other, const L& others_rest) {
    add(other, sum, rest);
    if constexpr (kRest) rest = rest + others_rest;
  }
};

template <class T>
bool any_not_finite(const T* elements, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto x = to_scalar(elements[i]);
    if (x - x != 0) return true;
  }
  return false;
}

template <Scaled kScaled, class T>
FASTSGD_LANE PieceMeasured squares_scaled(const T* from, std::int64_t count) {
  constexpr bool kRest = sizeof(T) == sizeof(double);  // a float32's square leaves room to add to
  constexpr double kFactor = kScaled == Scaled::kDown ? kScaledDown : kScaledUp;
  const auto factors = broadcast<DoubleRegister>(kFactor);
  Sums<kRest> sums;
  const auto add = [&](Elements elements) {
    if (kScaled != Scaled::kNot) {
      each_part([&](int i) { elements.part[i] = elements.part[i] * factors; });
    }
    sums.add_squares(elements);
  };
  std::int64_t at = 0;
  for (const std::int64_t fetching = fetching_of<T>(count); at + kMeasureLanes <= fetching;
       at += kMeasureLanes) {
    fetch_ahead<kMeasureLanes>(from + at);
    add(elements_of(from + at));
  }
  for (; at + kMeasureLanes <= count; at += kMeasureLanes) add(elements_of(from + at));
  if (at < count) {
    T last[kMeasureLanes] = {};
    for (int i = 0; at + i < count; ++i) last[i] = from[at + i];
    add(elements_of(last));
  }
  PieceMeasured measured = sums.total();
  measured.scaled = kScaled;
  return measured;
}

template <class T>
PieceMeasured squares(const char* memory, std::int64_t count) {
  const T* from = reinterpret_cast<const T*>(memory);
  PieceMeasured measured = squares_scaled<Scaled::kNot>(from, count);
  measured.not_finite = measured.high - measured.high != 0 && any_not_finite(from, count);
  switch (measured.out_of_range(sizeof(T) == sizeof(double))) {
    case Scaled::kDown:
      return squares_scaled<Scaled::kDown>(from, count);
    case Scaled::kUp:
      return squares_scaled<Scaled::kUp>(from, count);
    case Scaled::kNot:
      break;
  }
  if (measured.not_finite) measured.low = 0;
  return measured;
}

template <class T>
PieceMeasured magnitude(const char* memory, std::int64_t count) {
  using Scalar = typename Compute<T>::Scalar;
  using Register = typename RegisterOf<Scalar>::type;
  constexpr std::int64_t kLanes = sizeof(Register) / sizeof(Scalar);
  constexpr int kRow = 4;  // registers that wait for each other as little as for memory
  const T* from = reinterpret_cast<const T*>(memory);
  Register wide[kRow]{};
  const auto join = [&](Register& greatest, const Register& x) {
    greatest = lane::max(greatest, lane::max(x, -x));
  };
  std::int64_t at = 0;
  for (const std::int64_t fetching = fetching_of<T>(count); at + kRow * kLanes <= count;
       at += kRow * kLanes) {
    if (at < fetching) fetch_ahead<kRow * kLanes>(from + at);
#pragma GCC unroll 4
    for (int i = 0; i < kRow; ++i) join(wide[i], load<Register>(from + at + i * kLanes));
  }
  for (; at + kLanes <= count; at += kLanes) join(wide[0], load<Register>(from + at));
  for (int i = 1; i < kRow; ++i) join(wide[0], wide[i]);
  Scalar greatest = 0;
  for (std::int64_t i = 0; i < kLanes; ++i) greatest = lane::max(greatest, wide[0][i]);
  for (; at < count; ++at) {
    const Scalar x = to_scalar(from[at]);
    greatest = lane::max(greatest, lane::max(x, -x));
  }
  const double found = greatest;  // which may be -0, and is never less
  return {found + 0.0, 0, found - found != 0, Scaled::kNot};
}

}  // namespace
}  // namespace fastsgd
