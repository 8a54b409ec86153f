// Adam, and with decoupled weight decay AdamW: torch.optim.Adam, torch.optim.AdamW.
//
//   g <- g + weight_decay * p                     (decoupled: p <- (1 - lr * weight_decay) * p)
//   m <- beta1 * m + (1 - beta1) * g
//   v <- beta2 * v + (1 - beta2) * g^2
//   x <- amsgrad ? max(x, v) : v
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(x) / sqrt(1 - beta2^t) + eps)
//
// at a parameter's step t = 1, 2, ...; m, v and x begin as 0.
// Sources: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015; Loshchilov and
// Hutter, "Decoupled weight decay regularization", ICLR 2019; Reddi et al., "On the convergence of
// Adam and beyond", ICLR 2018 (amsgrad; as in torch without its bias correction of m).
#pragma once

#include "lane.h"
#include "rule.h"
#include "rules/lerp.h"

namespace fastsgd {

struct Adam {
  static constexpr const char* kName = "adam";

  enum { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kAmsgrad, kDecoupled };
  static constexpr Hyper kHypers[] = {
      {"lr", Hyper::kNumberOrTensor},           {"betas", Hyper::kNumberOrSingle, 0},
      {"betas", Hyper::kNumberOrSingle, 1},     {"eps"},
      {"weight_decay", Hyper::kNumberOrScalar}, {"amsgrad", Hyper::kFlag},
      {"decoupled_weight_decay", Hyper::kFlag}};

  static constexpr bool kCounts = true;
  static constexpr State kStates[] = {{"exp_avg", true}, {"exp_avg_sq"}, {"max_exp_avg_sq"}};
  enum Structure { kPlain, kPeaked, kStructures };
  static int structure(const Number* h) { return h[kAmsgrad].value != 0 ? kPeaked : kPlain; }
  static constexpr StateSet states(int structure) { return structure == kPeaked ? 0b111 : 0b011; }
  static bool adds_param(const Number* h) {
    return h[kWeightDecay].value != 0 && h[kDecoupled].value == 0;
  }
  static constexpr const char* kSparseError =
      "Adam does not support sparse gradients, please consider SparseAdam instead";

  template <class L>
  struct Scalars {
    L minus_step_size, weight1, beta2, weight2, root_of_bias2, eps, weight_decay, decay;
    bool decays, decoupled;
    template <class F>
    FASTSGD_LANE auto each(F f) const -> Scalars<decltype(f(L()))> {
      return {f(minus_step_size), f(weight1), f(beta2), f(weight2), f(root_of_bias2), f(eps),
              f(weight_decay),    f(decay),   decays,   decoupled};
    }
  };

  template <class N>
  FASTSGD_LANE static Scalars<double> scalars(const N* h, const Moment& moment) {
    const N bias1 = 1 - pow(h[kBeta1], moment.step), bias2 = 1 - pow(h[kBeta2], moment.step);
    return {.minus_step_size = -(h[kLr] / bias1).value,
            .weight1 = 1 - h[kBeta1].value,
            .beta2 = h[kBeta2].value,
            .weight2 = (1 - h[kBeta2]).value,
            .root_of_bias2 = pow(bias2, 0.5).value,
            .eps = h[kEps].value,
            .weight_decay = h[kWeightDecay].value,
            .decay = (1 - h[kLr] * h[kWeightDecay]).value,
            .decays = h[kWeightDecay].value != 0,
            .decoupled = h[kDecoupled].value != 0};
  }

  template <int kStructure, class L>
  FASTSGD_LANE static void update(const Scalars<L>& c, L& p, L g, L* state) {
    L &m = state[0], &v = state[1];
    if (c.decays) {
      if (c.decoupled) {
        p = p * c.decay;
      } else {
        g = lane::fma(p, c.weight_decay, g);
      }
    }
    m = lane::lerp(m, g, c.weight1);
    v = lane::fma(g * c.weight2, g, v * c.beta2);
    L x = v;
    if constexpr (kStructure == kPeaked) x = state[2] = lane::max(state[2], v);
    p = p + m * c.minus_step_size / (lane::sqrt(x) / c.root_of_bias2 + c.eps);
  }
};

}  // namespace fastsgd
