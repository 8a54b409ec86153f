// The step, as functions of a block and a thread.
#pragma once

#include "cuda/block.h"
#include "cuda/number.h"

namespace fastsgd::cuda {

// What the threads of a block share. All of it is computed once a block: one thread finds out where
// the elements lie, another the scalars meanwhile. `kAround` if anything is done around the rule.
template <class R, int kStructure, class T, bool kAround>
struct Block {
  using Scalar = typename Compute<T>::Scalar;
  static constexpr int kStates = size_of(R::states(kStructure));
  static constexpr int kStreams = kState + kStates;
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr bool kHalf = sizeof(T) == 2;

  typename R::template Scalars<Scalar> scalars;
  Around around;
  AroundLanes<Scalar> lanes;
  bool maximize;
  T* stream[kStreams];  // at the first element of the chunk; laid out ones at that of the item
  char* average;        // likewise; of float32 or of T
  int count;
  int head;       // elements before the first that is aligned in every stream; kApart if none is
  Corner corner;  // where the streams do not lie flat

  // `grads_here` are those of the arguments, where the tables have none.
  FASTSGD_LANE void find(const Tables& tables, char* const* grads_here, std::int64_t block,
                         bool laid_out) {
    const Chunk& chunk = tables.chunks[block];
    const Item& item = tables.items[chunk.item];
    char* grad = grad_of(tables, grads_here, chunk);
    count = chunk.count;
    const std::int64_t offset = corner.find(tables, chunk, laid_out);
    for (int s = 0; s < kStreams; ++s) {
      stream[s] = reinterpret_cast<T*>(s == kGrad ? grad : item.stream[s]) + offset;
    }
    average = item.stream[kStreams] + offset * average_size(tables.around);
    head = elements_before_alignment(tables.around);
  }

  // Likewise `hypers_here`.
  FASTSGD_LANE void compute(const Tables& tables, const Hypers* hypers_here, std::int64_t block) {
    const Item& item = tables.items[tables.chunks[block].item];
    // The counter and a copy of the options: all are on their way before any is looked at.
    const bool counts = item.counter != nullptr;
    const double steps = counts ? steps_of(item) : 0;
    const Hypers hypers = (tables.hypers == nullptr ? hypers_here : tables.hypers)[item.hypers];
    Number numbers[sizeof(R::kHypers) / sizeof(Hyper)];
    for (int i = 0; i < static_cast<int>(sizeof(numbers) / sizeof(Number)); ++i) {
      numbers[i] = read(hypers, i);
    }
    Moment moment;
    if (counts) {
      moment.first = steps == 0;
      moment.step = steps_after(item, steps);
    }
    scalars = R::scalars(numbers, moment).each([](double x) { return static_cast<Scalar>(x); });
    if constexpr (kAround) {
      around = around_of(tables);
      lanes = lanes_of<Scalar>(around);
    }
    maximize = hypers.maximize;
  }

  static FASTSGD_LANE bool averages(const Around& around) { return kAround && around.averages; }
  static FASTSGD_LANE bool wide(const Around& around) { return kHalf && around.wide; }
  static FASTSGD_LANE int average_size(const Around& around) {
    return static_cast<int>(wide(around) ? sizeof(float) : sizeof(T));
  }
  FASTSGD_LANE bool writes_grad() const { return kAround && around.writes_grad(); }

  FASTSGD_LANE int elements_before_alignment(const Around& around) const {
    const int first = over_alignment(stream[0]);
    const int needed = before_alignment(stream[0]);
    bool together = first % static_cast<int>(sizeof(T)) == 0;
    for (int s = 1; s < kStreams; ++s) together &= over_alignment(stream[s]) == first;
    if (averages(around)) together &= over_alignment(average + needed * average_size(around)) == 0;
    if (!together) return kApart;
    return needed < count ? needed : count;
  }

  // One element of each stream, in registers; as in the CPU's kernels.
  FASTSGD_LANE void update(Scalar& p, T& grad, Scalar* state) const {
    Scalar g = to_scalar(grad);
    if constexpr (kAround) {
      if (around.unscales) g = g / lanes.grad_scale;
      if (around.keeps_unscaled) to_storage(g, grad);
      g = lanes.clip(around, g);
    }
    if (maximize) g = -g;
    R::template update<kStructure>(scalars, p, g, state);
  }
  // What follows it, when the parameter is as it was stored.
  template <class E>
  FASTSGD_LANE void move(E& average, T stored) const {
    const auto p = to_scalar(stored);
    to_storage(lanes.average(around, static_cast<Scalar>(to_scalar(average)), p), average);
  }

  template <int kCount>
  FASTSGD_LANE void step_one(const std::int64_t (&at)[kCount]) const {
    T& param = stream[kParam][at[kParam]];
    Scalar p = to_scalar(param), state[kStates + 1];
    T grad = stream[kGrad][at[kGrad]];
    for (int i = 0; i < kStates; ++i) state[i] = to_scalar(stream[kState + i][at[kState + i]]);
    update(p, grad, state);
    for (int i = 0; i < kStates; ++i) to_storage(state[i], stream[kState + i][at[kState + i]]);
    if constexpr (kAround) {
      if (around.clears) grad = T{};
    }
    if (writes_grad()) stream[kGrad][at[kGrad]] = grad;
    T stored;
    to_storage(p, stored);
    param = stored;
    if constexpr (kAround) {
      if (!around.averages) return;
      const std::int64_t where = at[kStreams];
      if constexpr (kHalf) {
        if (around.wide) return move(reinterpret_cast<float*>(average)[where], stored);
      }
      move(reinterpret_cast<T*>(average)[where], stored);
    }
  }
  FASTSGD_LANE void step_one(int i) const {
    std::int64_t at[kStreams + kAround];
    for (std::int64_t& each : at) each = i;
    step_one(at);
  }

  // The averages of the parameters in a pack.
  static constexpr int kWidePacks = kHalf ? 2 : 1, kWidePack = Pack<float>::kSize;
  struct Averages {
    Pack<T> narrow;
    Pack<float> wide[kWidePacks];
  };
  template <bool kTogether>
  FASTSGD_LANE float* wide_at(int i, int pack) const {
    return reinterpret_cast<float*>(average) + i + pack * kWidePack * (kTogether ? 1 : kThreads);
  }
  // What is assumed of a pointer holds where it is assumed: not beyond an if.
  template <bool kTogether>
  FASTSGD_LANE void load(Averages& averages, int i) const {
    FASTSGD_ASSUME_GLOBAL(average);
    if (wide(around)) {
      for (int p = 0; p < kWidePacks; ++p) {
        averages.wide[p] = load_pack<kTogether>(wide_at<kTogether>(i, p));
      }
    } else {
      averages.narrow = load_pack<kTogether>(reinterpret_cast<T*>(average) + i);
    }
  }
  template <bool kTogether>
  FASTSGD_LANE void move_and_store(Averages& averages, const Pack<T>& param, int i) const {
    FASTSGD_ASSUME_GLOBAL(average);
    if (wide(around)) {
      for (int k = 0; kHalf && k < kPack; ++k) {
        move(averages.wide[k / kWidePack].item[k % kWidePack], param.item[k]);
      }
      for (int p = 0; p < kWidePacks; ++p) {
        store_pack<kTogether>(wide_at<kTogether>(i, p), averages.wide[p]);
      }
    } else {
      for (int k = 0; k < kPack; ++k) move(averages.narrow.item[k], param.item[k]);
      store_pack<kTogether>(reinterpret_cast<T*>(average) + i, averages.narrow);
    }
  }

  template <bool kTogether>
  FASTSGD_LANE void step_pack(int i) const {
    Pack<T> pack[kStreams];
    Averages of_pack{};
    for (int s = 0; s < kStreams; ++s) pack[s] = load_pack<kTogether>(stream[s] + i);
    if (averages(around)) load<kTogether>(of_pack, i);
    for (int k = 0; k < kPack; ++k) {
      Scalar p = to_scalar(pack[kParam].item[k]), state[kStates + 1];
      for (int j = 0; j < kStates; ++j) state[j] = to_scalar(pack[kState + j].item[k]);
      update(p, pack[kGrad].item[k], state);
      for (int j = 0; j < kStates; ++j) to_storage(state[j], pack[kState + j].item[k]);
      to_storage(p, pack[kParam].item[k]);
    }
    if constexpr (kAround) {
      if (around.clears) pack[kGrad] = {};
    }
    for (int s = 0; s < kStreams; ++s) {
      if (s != kGrad || writes_grad()) store_pack<kTogether>(stream[s] + i, pack[s]);
    }
    if (averages(around)) move_and_store<kTogether>(of_pack, pack[kParam], i);
  }

  // A thread's share of a chunk whose streams lie flat.
  FASTSGD_LANE void run_flat(int thread) const {
    for (int s = 0; s < kStreams; ++s) FASTSGD_ASSUME_GLOBAL(stream[s]);
    const auto one = [&](int i) { step_one(i); };
    if (head == kApart) {
      share_apart<kPack>(thread, count, [&](int i) { step_pack<false>(i); }, one);
    } else {
      share<kPack>(thread, count, head, [&](int i) { step_pack<true>(i); }, one);
    }
  }

  // A thread's share of one whose streams lie as the layout says.
  FASTSGD_LANE void run_laid_out(int thread) const {
    for (int i = thread; i < count; i += kThreads) {
      std::int64_t at[kStreams + kAround];
      corner.locate(i, 0, at);
      step_one(at);
    }
  }

  // A thread's share of clearing the gradients of a step that is skipped.
  FASTSGD_LANE void clear(int thread, bool laid_out) const {
    FASTSGD_ROLLED for (int i = thread; i < count; i += kThreads) {
      std::int64_t at[1] = {i};
      if (laid_out) corner.locate(i, kGrad, at);
      stream[kGrad][at[0]] = T{};
    }
  }
};

}  // namespace fastsgd::cuda
