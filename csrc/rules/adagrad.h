// Adagrad: torch.optim.Adagrad.
//
//   g <- g + weight_decay * p
//   s <- s + g^2
//   p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
//
// at a parameter's step t = 1, 2, ...; s begins as initial_accumulator_value.
// Source: Duchi et al., "Adaptive subgradient methods for online learning and stochastic
// optimization", JMLR 12, 2011.
#pragma once

#include "lane.h"
#include "rule.h"

namespace fastsgd {

struct Adagrad {
  static constexpr const char* kName = "adagrad";

  enum { kLr, kLrDecay, kEps, kWeightDecay };
  static constexpr Hyper kHypers[] = {{"lr", Hyper::kNumberOrTensor},
                                      {"lr_decay"},
                                      {"eps"},
                                      {"weight_decay", Hyper::kNumberOrScalar}};

  static constexpr bool kCounts = true;
  static constexpr State kStates[] = {{"sum"}};
  enum Structure { kSummed, kStructures };
  static int structure(const Number*) { return kSummed; }
  static constexpr StateSet states(int) { return 0b1; }
  static bool adds_param(const Number* h) { return h[kWeightDecay].value != 0; }
  static constexpr const char* kFill = "initial_accumulator_value";

  template <class L>
  struct Scalars {
    L minus_lr, eps, weight_decay;
    bool decays;
    template <class F>
    FASTSGD_LANE auto each(F f) const -> Scalars<decltype(f(L()))> {
      return {f(minus_lr), f(eps), f(weight_decay), decays};
    }
  };

  template <class N>
  FASTSGD_LANE static Scalars<double> scalars(const N* h, const Moment& moment) {
    return {.minus_lr = -(h[kLr] / (1 + (moment.step - 1) * h[kLrDecay])).value,
            .eps = h[kEps].value,
            .weight_decay = h[kWeightDecay].value,
            .decays = h[kWeightDecay].value != 0};
  }

  template <int kStructure, class L>
  FASTSGD_LANE static void update(const Scalars<L>& c, L& p, L g, L* state) {
    L& s = state[0];
    if (c.decays) g = lane::fma(p, c.weight_decay, g);
    s = lane::fma(g, g, s);
    p = p + g * c.minus_lr / (lane::sqrt(s) + c.eps);
  }
};

}  // namespace fastsgd
