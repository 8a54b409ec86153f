// Fetching memory ahead of its use. A step over many small tensors waits for little else: each
// tensor is a dozen objects in a dozen cache lines that no hardware can predict, but that were the
// same ones at the last step. A stale address costs nothing, as fetching cannot fault.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastsgd {

inline constexpr std::size_t kCacheLine = 64;
// How many tensors ahead: far enough for the second-level cache, near enough to stay in the first.
inline constexpr std::size_t kAhead = 6;

// Functions that only prefetch must be inlined always: GCC takes a call of one for a call without
// effect, and drops it.
#define FASTSGD_PREFETCHING inline __attribute__((always_inline))

// The lines of `kBytes` bytes from an object on, or from so many bytes behind its beginning. As
// there may be no object, numbers are reckoned with, not pointers.
template <std::size_t kBytes = 1>
FASTSGD_PREFETCHING void prefetch(const void* object, std::ptrdiff_t from = 0) {
  const auto begin = reinterpret_cast<std::uintptr_t>(object) + static_cast<std::uintptr_t>(from);
  const auto fetch = [begin](std::size_t at) __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + at));
  };
  for (std::size_t i = 0; i < kBytes; i += kCacheLine) fetch(i);
  if constexpr (kBytes > 1) fetch(kBytes - 1);
}

// A line that is read once, soon and in its turn: it waits for that beside the first-level cache,
// whose few places for lines on their way are left to what is read now.
FASTSGD_PREFETCHING void prefetch_to_second_level(const void* line) {
  __builtin_prefetch(line, 0, 2);
}

}  // namespace fastsgd
