// What a launch finds in device memory, and what travels in its arguments. Free of torch.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "layout.h"

namespace fastsgd::cuda {

// The hyper-parameters of a group. The device computes the scalars of a step from them: only it
// knows the number of the step.
struct Hypers {
  enum Kind : std::uint8_t {
    kPython,    // a Python number
    kFloat,     // a tensor's value, known to the host
    kDouble,    //
    kFloatAt,   // the address of a tensor's value on the device
    kDoubleAt,  //
  };
  union {
    double value;
    const void* address;
  } cell[kMaxHypers];
  Kind kind[kMaxHypers];
  bool maximize;
};

// A parameter. Its gradient's address is kept apart, as it is another after each backward.
struct Item {
  char* stream[kMaxStreams];
  std::int64_t count;
  char* counter;        // its steps so far, a number on the device; null where nobody asks
  std::int32_t hypers;  // the number of its group's
  std::int32_t layout;  // of those that do not lie flat
  bool counter_is_double;
};

// What one block does at a time: `count` elements of an item from `begin` on. One that measures
// does several of these, any other does one.
struct Chunk {
  std::int32_t item;
  std::int32_t count;
  std::int64_t begin;
};

// What the gradients are measured for, before the step.
struct Measuring {
  bool any = false;  // they are
  Order order = Order::kTwo;
  bool is_double = false;  // the norm's type
  bool clips = false;
  double max_norm = 0;
  bool skips = false;   // the step, if any gradient is not finite
  bool raises = false;  // likewise if the norm is not
};

// What stays on the device from one step to the next.
struct Standing {
  unsigned ticket = 0;                          // between launches
  unsigned skips = 0;                           // this step
  double norm = __builtin_nan(""), factor = 1;  // of the gradients that were measured last
  std::int64_t skipped = 0;                     // steps
  Measured measured{};                          // zeros between steps
};

// The tables of one launch.
struct Tables {
  const Item* items;
  const Chunk* chunks;
  const Layout* layouts;
  const Hypers* hypers;  // null where they are in the arguments
  char* const* grads;    // likewise; by item
  std::int32_t item_count, chunk_count;
  bool counts;              // something is to be counted: the steps of items, or the averages
  bool last;                // of the step's launches, or of those that measure
  const float* grad_scale;  // of a gradient scaler; null where there is none
  const float* found_inf;   // likewise: the step is skipped where it is not 0
  std::int64_t* averaged;   // how many averages there were; null if there are none
  Around around;            // but for what only the device knows
  Measuring measuring;
  Standing* standing;
};

// The arguments of a launch: up to 4 KB, which are cheap, or up to the 32,764 bytes that CUDA
// takes.
template <int kBytes>
struct Arguments {
  static constexpr int kHypers = kBytes / 8 / static_cast<int>(sizeof(Hypers));
  static constexpr int kGrads =
      (kBytes - kHypers * static_cast<int>(sizeof(Hypers)) - static_cast<int>(sizeof(Tables))) / 8;
  Tables tables;
  Hypers hypers[kHypers];
  char* grads[kGrads];
};
using FewArguments = Arguments<4096>;
using ManyArguments = Arguments<32760>;
static_assert(sizeof(FewArguments) <= 4096 && sizeof(ManyArguments) <= 32764);

inline constexpr int kThreads = 256;  // of a block

// Kernels that only devices have, by number: those that measure, for each storage type.
inline constexpr int kSquares = kAllKernels;
inline constexpr int kMagnitude = kSquares + kStorages;
inline constexpr int kDeviceKernels = kMagnitude + kStorages;
constexpr int measuring_kernel(Order order, int storage) {
  return (order == Order::kTwo ? kSquares : kMagnitude) + storage;
}

// How a kernel is found: by its number, whether its items lie flat, whether anything is done around
// the rule, and which arguments it takes. Kernels of which only one could tell are the same.
struct Launch {
  int kernel;
  bool laid_out;
  bool around;
  bool few;  // FewArguments; else ManyArguments
  int blocks;
};

}  // namespace fastsgd::cuda
