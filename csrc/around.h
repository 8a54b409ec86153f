// What a step does around the rule: to each gradient before it, and with each parameter after it.
// It is the same for all parameters of a step. Free of torch.
#pragma once

#include "lane.h"
#include "rules/lerp.h"

namespace fastsgd {

struct Around {
  double grad_scale = 1;  // of a gradient scaler: the gradient is divided by it
  double factor = 1;      // of clipping by norm: and multiplied by this
  double bound = 0;       // of clipping by value: and taken no farther than this from zero
  double weight = 0;      // of the parameter in its average
  bool unscales = false;
  bool keeps_unscaled = false;  // the gradient divided by the scale is written back
  bool clips = false;
  bool bounds = false;
  bool averages = false;
  bool starts = false;  // the average is the parameter
  bool wide = false;    // averages of parameters of 16 bits are float32
  bool clears = false;  // the gradient is set to zero

  FASTSGD_LANE bool before() const { return unscales || clips || bounds; }
  FASTSGD_LANE bool after() const { return averages || clears; }
  FASTSGD_LANE bool writes_grad() const { return keeps_unscaled || clears; }
};

// Its numbers as lanes.
template <class L>
struct AroundLanes {
  L grad_scale, factor, bound, weight;

  FASTSGD_LANE L clip(const Around& around, L g) const {
    if (around.clips) g = g * factor;
    if (around.bounds) {  // a NaN stays one
      g = g > bound ? bound : g;
      g = g < -bound ? -bound : g;
    }
    return g;
  }
  FASTSGD_LANE L average(const Around& around, L average, L p) const {
    return around.starts ? p : lane::lerp(average, p, weight);
  }
};

template <class L>
FASTSGD_LANE AroundLanes<L> lanes_of(const Around& around) {
  return {static_cast<L>(around.grad_scale), static_cast<L>(around.factor),
          static_cast<L>(around.bound), static_cast<L>(around.weight)};
}

}  // namespace fastsgd
