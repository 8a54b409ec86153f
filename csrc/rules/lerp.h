// Linear interpolation, made of other lane functions.
#pragma once

#include "lane.h"

namespace fastsgd::lane {

// a + weight * (b - a), from the nearer end: torch.lerp.
template <class L>
FASTSGD_LANE L lerp(L a, L b, L weight) {
  const auto near = (weight < 0.5f) & (weight > -0.5f);
  return fma(near ? weight : weight - 1.0f, b - a, near ? a : b);
}

}  // namespace fastsgd::lane
