// Runs a list of work on the CPU: one parallel region for all of it, or none when it is small.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel.h"
#include "layout.h"

namespace fastsgd {

// One tensor's work. The streams lie flat, or as `layout` says.
struct Work {
  char* stream[kMaxStreams];
  std::int64_t count;
  Kernel kernel;
  const Layout* layout;
  std::int32_t row;
  std::uint8_t item_size;
  std::uint8_t streams;
};

// Below this many bytes a parallel region costs more than it saves, and waiting for the GIL again does too.
inline constexpr std::int64_t kLongWork = 1 << 20;

// The bytes that `work` moves, each stream counted once.
inline std::int64_t bytes_of(const Work& work) {
  return work.count * work.item_size * work.streams;
}

// Does all the work; `bytes` is its sum. In the order of the list on one thread where `ordered`.
void run(const Work* work, std::size_t count, const Row* rows, std::int64_t bytes, bool ordered);

// The kernels for the instruction set that torch uses here (ATEN_CPU_CAPABILITY included).
const KernelTable& kernels();

// How many threads a long step uses now.
int threads();

// A kernel that sets its first stream to zero, for elements of one byte.
void zero(const Row& row, char* const* streams, std::int64_t count);

}  // namespace fastsgd
