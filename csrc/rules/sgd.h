// Stochastic gradient descent with momentum: torch.optim.SGD.
//
//   g <- g + weight_decay * p
//   b <- momentum * b + (1 - dampening) * g       (b <- g at a parameter's first step)
//   p <- p - lr * (nesterov ? g + momentum * b : b)
//
// Without momentum there is no b, and p <- p - lr * g.
// Source: Sutskever et al., "On the importance of initialization and momentum in deep learning",
// ICML 2013, in the form of torch.optim.SGD, which applies lr to the velocity and not within it.
#pragma once

#include "lane.h"
#include "rule.h"

namespace fastsgd {

struct Sgd {
  static constexpr const char* kName = "sgd";

  enum { kLr, kMomentum, kDampening, kWeightDecay, kNesterov };
  static constexpr Hyper kHypers[] = {{"lr", Hyper::kNumberOrTensor},
                                      {"momentum"},
                                      {"dampening"},
                                      {"weight_decay", Hyper::kNumberOrScalar},
                                      {"nesterov", Hyper::kFlag}};

  enum Structure { kPlain, kBuffered, kStructures };
  static constexpr State kStates[] = {{"momentum_buffer"}};
  static int structure(const Number* h) { return h[kMomentum].value != 0 ? kBuffered : kPlain; }
  static constexpr StateSet states(int structure) { return structure == kBuffered ? 0b1 : 0b0; }
  static bool adds_param(const Number* h) { return h[kWeightDecay].value != 0; }
  static constexpr NewState kNewState = NewState::kOfGrad;

  template <class L>
  struct Scalars {
    L minus_lr, momentum, gain, weight_decay;
    bool first, nesterov, decays;
    // The same scalars with `f` applied to each number: how doubles become lanes.
    template <class F>
    FASTSGD_LANE auto each(F f) const -> Scalars<decltype(f(L()))> {
      return {f(minus_lr), f(momentum), f(gain), f(weight_decay), first, nesterov, decays};
    }
  };

  template <class N>
  FASTSGD_LANE static Scalars<double> scalars(const N* h, const Moment& moment) {
    return {.minus_lr = -h[kLr].value,
            .momentum = h[kMomentum].value,
            .gain = 1 - h[kDampening].value,
            .weight_decay = h[kWeightDecay].value,
            .first = moment.first,
            .nesterov = h[kNesterov].value != 0,
            .decays = h[kWeightDecay].value != 0};
  }

  template <int kStructure, class L>
  FASTSGD_LANE static void update(const Scalars<L>& c, L& p, L g, L* state) {
    if (c.decays) g = lane::fma(p, c.weight_decay, g);
    if constexpr (kStructure == kBuffered) {
      L& b = state[0];
      b = c.first ? g : lane::fma(g, c.gain, b * c.momentum);
      g = c.nesterov ? lane::fma(b, c.momentum, g) : b;
    }
    p = lane::fma(g, c.minus_lr, p);
  }
};

}  // namespace fastsgd
