// Fetching memory ahead of its use. A step over many small tensors waits for little else: each
// tensor is a dozen objects in a dozen cache lines that no hardware can predict, but that were the
// same ones at the last step. A stale address costs nothing, as fetching cannot fault.
#pragma once

#include <cstddef>

namespace fastsgd {

inline constexpr std::size_t kCacheLine = 64;
// How many tensors ahead: far enough for the second-level cache, near enough to stay in the first.
inline constexpr std::size_t kAhead = 6;

// Functions that only prefetch must be inlined always: GCC takes a call of one for a call without
// effect, and drops it.
#define FASTSGD_PREFETCHING inline __attribute__((always_inline))

// The lines of an object of `kBytes` bytes.
template <std::size_t kBytes = 1>
FASTSGD_PREFETCHING void prefetch(const void* object) {
  const char* bytes = static_cast<const char*>(object);
  for (std::size_t i = 0; i < kBytes; i += kCacheLine) __builtin_prefetch(bytes + i);
  if constexpr (kBytes > 1) __builtin_prefetch(bytes + kBytes - 1);
}

}  // namespace fastsgd
