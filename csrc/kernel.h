// What passes between the host and a kernel: pointers, counts and a row of scalars. Free of torch,
// so that any compiler for any device can build the kernels.
#pragma once

#include <cstdint>

#include "rules/all.h"

namespace fastsgd {

// How the elements of a parameter, its gradient and its states are stored.
enum class Storage : std::uint8_t { kFloat, kDouble, kBFloat16, kHalf };
inline constexpr int kStorages = 4;

// The memory of one parameter is streams of equal length: the parameter, its gradient, its states.
inline constexpr int kParam = 0, kGrad = 1, kState = 2;
inline constexpr int kMaxStreams = kState + kMaxStates;

// Elements that lie side by side in every stream.
struct Run {
  char* stream[kMaxStreams];
  std::int64_t count;
  std::uint32_t traits;  // a note of whoever made it; no kernel reads it
};

// Updates `runs` runs whose elements are stored alike and whose scalars are the same.
using Kernel = void (*)(const Row& row, const Run* run, std::int64_t runs);

// The kernels of one instruction set.
struct KernelTable {
  const char* instruction_set;
  Kernel step[Rules::kSize][kMaxStructures][kStorages];
};

}  // namespace fastsgd
