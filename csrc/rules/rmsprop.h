// RMSprop: torch.optim.RMSprop.
//
//   g <- g + weight_decay * p
//   v <- alpha * v + (1 - alpha) * g^2
//   d <- sqrt(v) + eps                            (centered: a <- alpha * a + (1 - alpha) * g,
//                                                            d <- sqrt(v - a^2) + eps)
//   p <- p - lr * g / d                           (momentum: b <- momentum * b + g / d,
//                                                            p <- p - lr * b)
//
// v, a and b begin as 0.
// Sources: Tieleman and Hinton, "Lecture 6.5", COURSERA 2012; Graves, "Generating sequences with
// recurrent neural networks", 2013 (centered). As in torch, eps is added after the root.
#pragma once

#include "lane.h"
#include "rule.h"
#include "rules/lerp.h"

namespace fastsgd {

struct RmsProp {
  static constexpr const char* kName = "rmsprop";

  enum { kLr, kAlpha, kEps, kWeightDecay, kMomentum, kCentered };
  static constexpr Hyper kHypers[] = {
      {"lr", Hyper::kNumberOrTensor},           {"alpha"},    {"eps"},
      {"weight_decay", Hyper::kNumberOrScalar}, {"momentum"}, {"centered", Hyper::kFlag}};

  static constexpr bool kCounts = true;
  static constexpr State kStates[] = {{"square_avg"}, {"momentum_buffer"}, {"grad_avg", true}};
  enum Structure { kPlain, kWithBuffer = 1, kWithMean = 2, kStructures = 4 };
  static int structure(const Number* h) {
    return (h[kMomentum].value > 0 ? kWithBuffer : 0) | (h[kCentered].value != 0 ? kWithMean : 0);
  }
  static constexpr StateSet states(int structure) {
    return 0b001u | static_cast<StateSet>(structure) << 1;
  }
  static bool adds_param(const Number* h) { return h[kWeightDecay].value != 0; }
  static constexpr const char* kSparseError = "RMSprop does not support sparse gradients";

  template <class L>
  struct Scalars {
    L minus_lr, alpha, weight, eps, weight_decay, momentum;
    bool decays;
    template <class F>
    FASTSGD_LANE auto each(F f) const -> Scalars<decltype(f(L()))> {
      return {f(minus_lr), f(alpha), f(weight), f(eps), f(weight_decay), f(momentum), decays};
    }
  };

  template <class N>
  FASTSGD_LANE static Scalars<double> scalars(const N* h, const Moment&) {
    return {.minus_lr = -h[kLr].value,
            .alpha = h[kAlpha].value,
            .weight = 1 - h[kAlpha].value,
            .eps = h[kEps].value,
            .weight_decay = h[kWeightDecay].value,
            .momentum = h[kMomentum].value,
            .decays = h[kWeightDecay].value != 0};
  }

  template <int kStructure, class L>
  FASTSGD_LANE static void update(const Scalars<L>& c, L& p, L g, L* state) {
    L& v = state[0];
    if (c.decays) g = lane::fma(p, c.weight_decay, g);
    v = lane::fma(g * c.weight, g, v * c.alpha);
    L variance = v;
    if constexpr ((kStructure & kWithMean) != 0) {
      L& a = state[size_of(states(kStructure)) - 1];
      a = lane::lerp(a, g, c.weight);
      variance = lane::fma(-a, a, v);
    }
    const L d = lane::sqrt(variance) + c.eps;
    if constexpr ((kStructure & kWithBuffer) != 0) {
      L& b = state[1];
      b = b * c.momentum + g / d;
      p = lane::fma(b, c.minus_lr, p);
    } else {
      p = p + g * c.minus_lr / d;
    }
  }
};

}  // namespace fastsgd
