// What the walk says of a parameter's update: where it stands, its tensors, and how it is done.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernel.h"

namespace fastsgd {

// Where a parameter stands, for messages.
struct Place {
  std::int64_t group, index;
};

// A parameter as the walk found it: its streams, and null for a state that it does not have yet;
// after them the counter of its steps, if the rule counts them.
struct Subject {
  c10::TensorImpl* tensor[kMaxStreams + 1];
  int streams;
};

// For each stream of a parameter, the tensor whose version counts the writes to it.
using Owners = c10::TensorImpl* const*;

// The storage types that hold numbers up to a magnitude, a bit for each.
inline constexpr std::uint8_t kAllStorages = (1 << kStorages) - 1;
inline constexpr std::uint8_t kHalfStorages =
    1 << static_cast<int>(Storage::kBFloat16) | 1 << static_cast<int>(Storage::kHalf);
constexpr std::uint8_t storages_that_hold(double magnitude) {
  constexpr double kMost[kStorages] = {0x1.fffffep127, 0x1.fffffffffffffp1023, 0x1.fep127, 65504};
  std::uint8_t storages = 0;
  for (int i = 0; i < kStorages; ++i) storages |= (magnitude <= kMost[i]) << i;
  return storages;
}

// How some parameters are updated: those of one group, at one step of theirs.
struct Update {
  const Structure* structure = nullptr;
  int kernel = kNoKernel;  // that for the first storage type; the others' follow
  std::int32_t row = -1;
  bool writes_grad = false;
  bool adds_param = false;               // to the gradient
  bool wide = false;                     // averages of parameters of 16 bits are float32
  std::uint8_t storages = kAllStorages;  // a bit for each type that the kernels can take
  std::uint8_t usual = kAllStorages;     // and that is in no way special

  bool writes(int stream) const { return stream != kGrad || writes_grad; }
  bool takes(Storage type) const { return (storages >> static_cast<int>(type) & 1) != 0; }
};

}  // namespace fastsgd
