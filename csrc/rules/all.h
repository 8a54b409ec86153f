// The list of rules. A rule is added here and nowhere else in csrc.
#pragma once

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace fastsgd {

template <class... R>
struct List {
  static constexpr int kSize = sizeof...(R);
};

using Rules = List<Sgd, Adam, RmsProp, Adagrad>;

}  // namespace fastsgd
