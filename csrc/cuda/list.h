// The list of what launches do, for whoever has a table of it: the kernels, and the host's bodies.
#pragma once

#include "cuda/measure.h"
#include "cuda/pairs.h"
#include "cuda/step.h"

namespace fastsgd::cuda {

// What is done to one storage type without a rule.
template <class T, class Entry, class Make, class... What>
void fill_pairs(Entry* table, int type, Make make, List<What...>) {
  ((table[What::kKernel + type] = make.template pairs<What, T>()), ...);
}

// Fills a table by number: with make.step() of every rule, structure and storage type; and, where
// anything is done around rules, with make.pairs() and make.measure() of every storage type.
template <bool kAround, class Entry, class Make>
void fill_device_kernels(Entry* table, Make make) {
  fill_kernels(
      table,
      [&]<class R, int kStructure, class T>(Instance<R, kStructure, T>) {
        return make.template step<R, kStructure, T>();
      },
      Rules{});
  if constexpr (kAround) {
    each_storage([&]<class T>(int type) {
      fill_pairs<T>(table, type, make, List<Averaging, Clipping, Exchanging>{});
      table[kSquares + type] = make.template measure<Order::kTwo, T>();
      table[kMagnitude + type] = make.template measure<Order::kInfinity, T>();
    });
  }
}

}  // namespace fastsgd::cuda
