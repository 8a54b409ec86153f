// What a block of threads does, as functions of a block and a thread: a kernel calls them on the
// device, and the host can call them in loops, over the same tables.
#pragma once

#include <cstdint>

#include "cuda/number.h"
#include "cuda/table.h"
#include "lane.h"
#include "storage.h"

// A loop whose passes are few: unrolled it would only take registers.
#if defined(__CUDACC__)
#define FASTSGD_ROLLED _Pragma("unroll 1")
#else
#define FASTSGD_ROLLED
#endif

// Pointers read from a table could point anywhere, for all a compiler knows.
#if defined(__CUDA_ARCH__)
#define FASTSGD_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define FASTSGD_ASSUME_GLOBAL(pointer)
#endif

namespace fastsgd::cuda {

inline constexpr int kPackBytes = 16;  // the widest that a thread loads or stores at once

// The steps of a parameter so far.
FASTSGD_LANE double steps_of(const Item& item) {
  if (item.counter_is_double) return *reinterpret_cast<const double*>(item.counter);
  return *reinterpret_cast<const float*>(item.counter);
}

FASTSGD_LANE void count_step(const Item& item) {
  if (item.counter == nullptr) return;
  if (item.counter_is_double) {
    *reinterpret_cast<double*>(item.counter) += 1;
  } else {
    *reinterpret_cast<float*>(item.counter) += 1;
  }
}

// Whether a gradient scaler has found an infinity or a NaN: then nothing is to be done at all.
FASTSGD_LANE bool skips(const Tables& tables) {
  return tables.found_inf != nullptr && *tables.found_inf != 0;
}

// index / size, without the long division of 64 bits where the quotient can be only 0 or 1.
FASTSGD_LANE std::uint32_t times_within(std::int64_t index, std::int64_t size) {
  if (size >= std::int64_t{1} << 31) return index >= size ? 1 : 0;
  return static_cast<std::uint32_t>(index) / static_cast<std::uint32_t>(size);
}

// What the threads of a block share. All of it is computed once a block, by one thread.
template <class R, int kStructure, class T>
struct Block {
  using Scalar = typename Compute<T>::Scalar;
  static constexpr int kStates = size_of(R::states(kStructure));
  static constexpr int kStreams = kState + kStates;
  static constexpr int kPack = kPackBytes / static_cast<int>(sizeof(T));
  struct alignas(kPackBytes) Pack {
    T item[kPack];
  };

  typename R::template Scalars<Scalar> scalars;
  Scalar grad_scale;
  bool unscale, maximize;
  T* stream[kStreams];  // at the first element of the chunk; laid out ones at that of the item
  int count;
  int head;                      // elements before the first that is aligned in every stream
  const Layout* layout;          // where the streams do not lie flat
  std::int64_t first[kMaxDims];  // and the index of the chunk's first element in it

  // `hypers_here` and `grads_here` are those of the arguments, where the tables have none.
  FASTSGD_LANE void prepare(const Tables& tables, const Hypers* hypers_here,
                            char* const* grads_here, std::int64_t block, bool laid_out) {
    const Chunk& chunk = tables.chunks[block];
    const Item& item = tables.items[chunk.item];
    // A copy: all of it is on its way before any of it is looked at.
    const Hypers hypers = (tables.hypers == nullptr ? hypers_here : tables.hypers)[item.hypers];
    char* grad = (tables.grads == nullptr ? grads_here : tables.grads)[chunk.item];

    Number numbers[sizeof(R::kHypers) / sizeof(Hyper)];
    for (int i = 0; i < static_cast<int>(sizeof(numbers) / sizeof(Number)); ++i) {
      numbers[i] = read(hypers, i);
    }
    Moment moment;
    if (item.counter != nullptr) {
      const double steps = steps_of(item);
      moment.first = steps == 0;
      moment.step = steps + 1;
    }
    scalars = R::scalars(numbers, moment).each([](double x) { return static_cast<Scalar>(x); });
    unscale = tables.grad_scale != nullptr;
    grad_scale = unscale ? static_cast<Scalar>(*tables.grad_scale) : Scalar{1};
    maximize = hypers.maximize;

    count = chunk.count;
    layout = nullptr;
    std::int64_t offset = chunk.begin;
    if (laid_out) {
      layout = &tables.layouts[item.layout];
      for (int d = layout->dims - 1; d >= 0; --d) {
        first[d] = offset % layout->size[d];
        offset /= layout->size[d];
      }
    }
    for (int s = 0; s < kStreams; ++s) {
      stream[s] = reinterpret_cast<T*>(s == kGrad ? grad : item.stream[s]) + offset;
    }
    head = elements_before_alignment();
  }

  // All of them where the streams are aligned differently.
  FASTSGD_LANE int elements_before_alignment() const {
    const auto over = [](const T* address) {
      return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) % kPackBytes);
    };
    const int first = over(stream[0]);
    bool together = first % static_cast<int>(sizeof(T)) == 0;
    for (int s = 1; s < kStreams; ++s) together &= over(stream[s]) == first;
    const int needed = (kPackBytes - first) % kPackBytes / static_cast<int>(sizeof(T));
    return together && needed < count ? needed : count;
  }

  // One element of each stream, in registers; as in the CPU's kernels.
  FASTSGD_LANE void update(Scalar& p, T& grad, Scalar* state) const {
    Scalar g = to_scalar(grad);
    if (unscale) to_storage(g = g / grad_scale, grad);
    if (maximize) g = -g;
    R::template update<kStructure>(scalars, p, g, state);
  }

  FASTSGD_LANE void step_one(const std::int64_t* at) const {
    Scalar p = to_scalar(stream[kParam][at[kParam]]), state[kStates + 1];
    T grad = stream[kGrad][at[kGrad]];
    for (int i = 0; i < kStates; ++i) state[i] = to_scalar(stream[kState + i][at[kState + i]]);
    update(p, grad, state);
    for (int i = 0; i < kStates; ++i) to_storage(state[i], stream[kState + i][at[kState + i]]);
    if (unscale) stream[kGrad][at[kGrad]] = grad;
    to_storage(p, stream[kParam][at[kParam]]);
  }
  FASTSGD_LANE void step_one(int i) const {
    std::int64_t at[kStreams];
    for (int s = 0; s < kStreams; ++s) at[s] = i;
    step_one(at);
  }

  FASTSGD_LANE void step_pack(int i) const {
    Pack pack[kStreams];
    for (int s = 0; s < kStreams; ++s) pack[s] = *reinterpret_cast<const Pack*>(stream[s] + i);
    for (int k = 0; k < kPack; ++k) {
      Scalar p = to_scalar(pack[kParam].item[k]), state[kStates + 1];
      for (int j = 0; j < kStates; ++j) state[j] = to_scalar(pack[kState + j].item[k]);
      update(p, pack[kGrad].item[k], state);
      for (int j = 0; j < kStates; ++j) to_storage(state[j], pack[kState + j].item[k]);
      to_storage(p, pack[kParam].item[k]);
    }
    for (int s = 0; s < kStreams; ++s) {
      if (s != kGrad || unscale) *reinterpret_cast<Pack*>(stream[s] + i) = pack[s];
    }
  }

  // A thread's share of a chunk whose streams lie flat.
  FASTSGD_LANE void run_flat(int thread) const {
    for (int s = 0; s < kStreams; ++s) FASTSGD_ASSUME_GLOBAL(stream[s]);
    const int packs = (count - head) / kPack;
    for (int i = thread; i < packs; i += kThreads) step_pack(head + i * kPack);
    FASTSGD_ROLLED for (int i = thread; i < head; i += kThreads) step_one(i);
    FASTSGD_ROLLED for (int i = head + packs * kPack + thread; i < count; i += kThreads)
        step_one(i);
  }

  // A thread's share of one whose streams lie as the layout says.
  FASTSGD_LANE void run_laid_out(int thread) const {
    for (int i = thread; i < count; i += kThreads) {
      std::int64_t at[kStreams] = {};
      auto carry = static_cast<std::uint32_t>(i);
      for (int d = layout->dims - 1; d >= 0; --d) {
        const std::int64_t size = layout->size[d];
        std::int64_t index = first[d] + carry;
        carry = times_within(index, size);
        index -= carry * size;
        for (int s = 0; s < kStreams; ++s) at[s] += index * layout->stride[d][s];
      }
      step_one(at);
    }
  }
};

// A thread's share of a chunk whose bytes are set to zero.
FASTSGD_LANE void zero_bytes(const Tables& tables, std::int64_t block, int thread) {
  const Chunk& chunk = tables.chunks[block];
  char* bytes = tables.items[chunk.item].stream[kParam] + chunk.begin;
  const auto over = static_cast<int>(reinterpret_cast<std::uintptr_t>(bytes) % kPackBytes);
  const int needed = (kPackBytes - over) % kPackBytes;
  const int head = needed < chunk.count ? needed : chunk.count;
  const int packs = (chunk.count - head) / kPackBytes;
  struct alignas(kPackBytes) Pack {
    std::uint64_t half[2];
  };
  FASTSGD_ASSUME_GLOBAL(bytes);
  for (int i = thread; i < packs; i += kThreads) {
    *reinterpret_cast<Pack*>(bytes + head + i * kPackBytes) = {};
  }
  FASTSGD_ROLLED for (int i = thread; i < head; i += kThreads) bytes[i] = 0;
  FASTSGD_ROLLED for (int i = head + packs * kPackBytes + thread; i < chunk.count; i += kThreads)
      bytes[i] = 0;
}

}  // namespace fastsgd::cuda
