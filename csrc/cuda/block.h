// What a block of threads does, as functions of a block and a thread: a kernel calls them on the
// device, and the host can call them in loops, over the same tables.
#pragma once

#include <cstdint>

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

// Neighbouring elements that are loaded and stored at once.
template <class T>
struct alignas(kPackBytes) Pack {
  static constexpr int kSize = kPackBytes / static_cast<int>(sizeof(T));
  T item[kSize];
};

FASTSGD_LANE int over_alignment(const void* address) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(address) % kPackBytes);
}
// How many elements lie before the first that is aligned.
template <class T>
FASTSGD_LANE int before_alignment(const T* address) {
  return (kPackBytes - over_alignment(address)) % kPackBytes / static_cast<int>(sizeof(T));
}
// The pack at an address, which must be aligned: a device faults else, so the host does.
template <class P, class T>
FASTSGD_LANE P& pack_at(T* address) {
#if !defined(__CUDA_ARCH__)
  if (over_alignment(address) != 0) __builtin_trap();
#endif
  return *reinterpret_cast<P*>(address);
}

// A pack whose elements lie side by side, which must be aligned; or else kThreads apart, so that
// neighbouring threads load and store neighbours.
template <bool kTogether, class T>
FASTSGD_LANE Pack<T> load_pack(const T* from) {
  if constexpr (kTogether) {
    return pack_at<const Pack<T>>(from);
  } else {
    Pack<T> pack;
    for (int k = 0; k < Pack<T>::kSize; ++k) pack.item[k] = from[k * kThreads];
    return pack;
  }
}
template <bool kTogether, class T>
FASTSGD_LANE void store_pack(T* to, const Pack<T>& pack) {
  if constexpr (kTogether) {
    pack_at<Pack<T>>(to) = pack;
  } else {
    for (int k = 0; k < Pack<T>::kSize; ++k) to[k * kThreads] = pack.item[k];
  }
}

// Where the first element lies that is aligned in every stream: nowhere.
inline constexpr int kApart = -1;

// A thread's share of `count` elements that lie side by side: packs from the `head`th element on,
// and single elements before and after.
template <int kPack, class Packs, class One>
FASTSGD_LANE void share(int thread, int count, int head, Packs packs, One one) {
  const int whole = (count - head) / kPack;
  for (int i = thread; i < whole; i += kThreads) packs(head + i * kPack);
  FASTSGD_ROLLED for (int i = thread; i < head; i += kThreads) one(i);
  FASTSGD_ROLLED for (int i = head + whole * kPack + thread; i < count; i += kThreads) one(i);
}

// The same of streams that are aligned differently: as many single elements at once, as one after
// the other would wait for memory.
template <int kPack, class Packs, class One>
FASTSGD_LANE void share_apart(int thread, int count, Packs packs, One one) {
  int i = thread;
  for (; i + (kPack - 1) * kThreads < count; i += kPack * kThreads) packs(i);
  FASTSGD_ROLLED for (; i < count; i += kThreads) one(i);
}

// --- layouts ------------------------------------------------------------------------------------

// index / size, without the long division of 64 bits where the quotient can be only 0 or 1.
FASTSGD_LANE std::uint32_t times_within(std::int64_t index, std::int64_t size) {
  if (size >= std::int64_t{1} << 31) return index >= size ? 1 : 0;
  return static_cast<std::uint32_t>(index) / static_cast<std::uint32_t>(size);
}

// Where in a layout a chunk begins.
struct Corner {
  const Layout* layout;
  std::int64_t index[kMaxDims];

  // Of an item that is laid out. Returns how far into its memory the chunk of another begins.
  FASTSGD_LANE std::int64_t find(const Tables& tables, const Chunk& chunk, bool laid_out) {
    std::int64_t begin = chunk.begin;
    if (!laid_out) return begin;
    layout = &tables.layouts[tables.items[chunk.item].layout];
    for (int d = layout->dims - 1; d >= 0; --d) {
      index[d] = begin % layout->size[d];
      begin /= layout->size[d];
    }
    return 0;
  }
  // Where in each of some streams, from the `first` on, the chunk's `i`th element lies.
  template <int kCount>
  FASTSGD_LANE void locate(int i, int first, std::int64_t (&at)[kCount]) const {
    for (int s = 0; s < kCount; ++s) at[s] = 0;
    auto carry = static_cast<std::uint32_t>(i);
    for (int d = layout->dims - 1; d >= 0; --d) {
      const std::int64_t size = layout->size[d];
      std::int64_t there = index[d] + carry;
      carry = times_within(there, size);
      there -= carry * size;
      for (int s = 0; s < kCount; ++s) at[s] += there * layout->stride[d][first + s];
    }
  }
};

// --- what is shared by all blocks of a launch ---------------------------------------------------

// Has every thread of the block do something, and waits for all of them.
template <class F>
FASTSGD_LANE void all_threads(F f) {
#if defined(__CUDA_ARCH__)
  f(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kThreads; ++thread) f(thread);
#endif
}

// Whether every other block of a launch has asked this before. To be asked once a block.
FASTSGD_LANE bool is_last(unsigned& ticket, int blocks) {
#if defined(__CUDA_ARCH__)
  __threadfence();  // what was read or written before this is, for whoever comes last
  const unsigned before = atomicAdd(&ticket, 1);
#else
  const unsigned before = ticket++;
#endif
  if (before != static_cast<unsigned>(blocks) - 1) return false;
#if defined(__CUDA_ARCH__)
  __threadfence();
#endif
  ticket = 0;
  return true;
}

// Whether a gradient scaler has found an infinity or a NaN, or whoever measured has: then the step
// is skipped.
FASTSGD_LANE bool overflowed(const Tables& tables) {
  return tables.found_inf != nullptr && *tables.found_inf != 0;
}
FASTSGD_LANE bool skips(const Tables& tables) {
  const Measuring& what = tables.measuring;
  return overflowed(tables) || ((what.skips || what.raises) && tables.standing->skips != 0);
}

// The steps of a parameter so far.
FASTSGD_LANE double steps_of(const Item& item) {
  if (item.counter_is_double) return *reinterpret_cast<const double*>(item.counter);
  return *reinterpret_cast<const float*>(item.counter);
}

// After one more, as the counter will say: a float32 stays at 2^24.
FASTSGD_LANE double steps_after(const Item& item, double steps) {
  return item.counter_is_double ? steps + 1 : static_cast<double>(static_cast<float>(steps + 1));
}

FASTSGD_LANE void count_step(const Item& item) {
  if (item.counter == nullptr) return;
  if (item.counter_is_double) {
    *reinterpret_cast<double*>(item.counter) += 1;
  } else {
    *reinterpret_cast<float*>(item.counter) += 1;
  }
}

// A thread's share of the counting, once every block has read what it needs of the counters.
FASTSGD_LANE void count(const Tables& tables, int thread) {
  for (int i = thread; i < tables.item_count; i += kThreads) count_step(tables.items[i]);
  if (tables.last && tables.averaged != nullptr && thread == 0) ++*tables.averaged;
}

FASTSGD_LANE char* grad_of(const Tables& tables, char* const* grads_here, const Chunk& chunk) {
  return (tables.grads == nullptr ? grads_here : tables.grads)[chunk.item];
}

// What is done around the rule, as the device knows it.
FASTSGD_LANE Around around_of(const Tables& tables) {
  Around around = tables.around;
  if (tables.grad_scale != nullptr) around.grad_scale = *tables.grad_scale;
  if (tables.measuring.clips) {
    around.factor = tables.standing->factor;
    around.clips = around.factor != 1;
  }
  if (tables.averaged != nullptr) around.starts = *tables.averaged == 0;
  return around;
}

// --- zeros --------------------------------------------------------------------------------------

// A thread's share of a chunk whose bytes are set to zero.
FASTSGD_LANE void zero_bytes(const Tables& tables, std::int64_t block, int thread) {
  const Chunk& chunk = tables.chunks[block];
  char* bytes = tables.items[chunk.item].stream[kParam] + chunk.begin;
  const int needed = before_alignment(bytes);
  FASTSGD_ASSUME_GLOBAL(bytes);
  share<kPackBytes>(
      thread, chunk.count, needed < chunk.count ? needed : chunk.count,
      [&](int i) { pack_at<Pack<std::uint64_t>>(bytes + i) = {}; }, [&](int i) { bytes[i] = 0; });
}

}  // namespace fastsgd::cuda
