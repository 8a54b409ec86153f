// What is done to tensors, or pairs of them, without a rule; as functions of a block and a thread.
#pragma once

#include "cuda/block.h"

namespace fastsgd::cuda {

// An average of a parameter that is not stepped, and the parameter.
struct Averaging {
  static constexpr int kKernel = kAverage;
  static constexpr bool kPairs = true, kWritesSecond = false;
  FASTSGD_LANE static bool changes(const Around&) { return true; }
  template <class L, class T>
  FASTSGD_LANE static void apply(const Around& around, const AroundLanes<L>& lanes, T& average,
                                 const T& param) {
    to_storage(lanes.average(around, to_scalar(average), to_scalar(param)), average);
  }
};

// A tensor that is clipped.
struct Clipping {
  static constexpr int kKernel = kScale;
  static constexpr bool kPairs = false, kWritesSecond = false;
  FASTSGD_LANE static bool changes(const Around& around) { return around.clips || around.bounds; }
  template <class L, class T>
  FASTSGD_LANE static void apply(const Around& around, const AroundLanes<L>& lanes, T& x, T&) {
    to_storage(lanes.clip(around, to_scalar(x)), x);
  }
};

// Two that change places.
struct Exchanging {
  static constexpr int kKernel = kExchange;
  static constexpr bool kPairs = true, kWritesSecond = true;
  FASTSGD_LANE static bool changes(const Around&) { return true; }
  template <class L, class T>
  FASTSGD_LANE static void apply(const Around&, const AroundLanes<L>&, T& a, T& b) {
    const T kept = a;
    a = b;
    b = kept;
  }
};

// The second of a pair is where gradients are; so is a tensor alone.
template <class What, class T>
struct PairBlock {
  using Scalar = typename Compute<T>::Scalar;
  static constexpr int kCount = What::kPairs ? 2 : 1, kLast = kCount - 1;

  Around around;
  AroundLanes<Scalar> lanes;
  T* stream[kCount];
  int count;
  int head;  // elements before the first that is aligned in both; kApart if none is
  Corner corner;

  FASTSGD_LANE void prepare(const Tables& tables, char* const* grads_here, std::int64_t block,
                            bool laid_out) {
    const Chunk& chunk = tables.chunks[block];
    const Item& item = tables.items[chunk.item];
    around = around_of(tables);
    lanes = lanes_of<Scalar>(around);
    count = chunk.count;
    if (!What::changes(around)) count = 0;  // gradients within the norm are not written
    const std::int64_t offset = corner.find(tables, chunk, laid_out);
    stream[0] = reinterpret_cast<T*>(item.stream[0]) + offset;
    stream[kLast] = reinterpret_cast<T*>(grad_of(tables, grads_here, chunk)) + offset;
    const int needed = before_alignment(stream[0]);
    const bool together = over_alignment(stream[0]) == over_alignment(stream[kLast]);
    head = !together ? kApart : needed < count ? needed : count;
  }

  // Loaded, and stored where they are written.
  FASTSGD_LANE void act_one(std::int64_t i, std::int64_t j) const {
    T first = stream[0][i], second = stream[kLast][j];
    What::apply(around, lanes, first, second);
    stream[0][i] = first;
    if (What::kWritesSecond) stream[kLast][j] = second;
  }
  template <bool kTogether>
  FASTSGD_LANE void act_pack(int i) const {
    Pack<T> first = load_pack<kTogether>(stream[0] + i);
    Pack<T> second = load_pack<kTogether>(stream[kLast] + i);
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      What::apply(around, lanes, first.item[k], second.item[k]);
    }
    store_pack<kTogether>(stream[0] + i, first);
    if (What::kWritesSecond) store_pack<kTogether>(stream[kLast] + i, second);
  }

  FASTSGD_LANE void run_flat(int thread) const {
    FASTSGD_ASSUME_GLOBAL(stream[0]);
    FASTSGD_ASSUME_GLOBAL(stream[kLast]);
    const auto one = [&](int i) { act_one(i, i); };
    if (head == kApart) {
      share_apart<Pack<T>::kSize>(thread, count, [&](int i) { act_pack<false>(i); }, one);
    } else {
      share<Pack<T>::kSize>(thread, count, head, [&](int i) { act_pack<true>(i); }, one);
    }
  }
  FASTSGD_LANE void run_laid_out(int thread) const {
    for (int i = thread; i < count; i += kThreads) {
      std::int64_t where[kCount];
      corner.locate(i, 0, where);
      act_one(where[0], where[kLast]);
    }
  }
};

}  // namespace fastsgd::cuda
