// What passes between the host and a kernel: pointers, counts and a row of scalars. Free of torch,
// so that any compiler for any device can build the kernels.
#pragma once

#include <cstdint>

#include "around.h"
#include "norm.h"
#include "rules/all.h"
#include "storage.h"

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

// Updates `runs` runs whose elements are stored alike and whose scalars are the same. The average
// of a parameter, if there is one, is the stream after its states.
using Kernel = void (*)(const Row& row, const Around& around, const Run* run, std::int64_t runs);
// Measures at most kPiece elements.
using Measure = PieceMeasured (*)(const char* elements, std::int64_t count);

// What names a kernel on every device: the number of a rule, a structure of it, a storage type.
inline constexpr int kNoKernel = -2;
inline constexpr int kZero = -1;  // sets the first stream to zero, for elements of one byte
inline constexpr int kKernels = Rules::kSize * kMaxStructures * kStorages;
inline constexpr int kAverage = kKernels;  // the first stream is an average, of the second
inline constexpr int kScale = kAverage + kStorages;   // the first stream is multiplied
inline constexpr int kExchange = kScale + kStorages;  // the first two change places
inline constexpr int kAllKernels = kExchange + kStorages;
constexpr bool is_exchange(int kernel) { return kernel >= kExchange && kernel < kAllKernels; }
constexpr bool is_step(int kernel) { return kernel >= 0 && kernel < kKernels; }
constexpr bool has_grads(int kernel) {
  return is_step(kernel) || (kernel >= kScale && kernel < kExchange);
}
constexpr int first_kernel(int rule, int structure) {  // that for the first storage type
  return (rule * kMaxStructures + structure) * kStorages;
}

// What a kernel is compiled for.
template <class R, int kStructure, class T>
struct Instance {};

// Calls visit.operator()<T>(type) for every storage type.
template <class Visit>
constexpr void each_storage(Visit visit) {
  visit.template operator()<float>(static_cast<int>(Storage::kFloat));
  visit.template operator()<double>(static_cast<int>(Storage::kDouble));
  visit.template operator()<BFloat16>(static_cast<int>(Storage::kBFloat16));
  visit.template operator()<Half>(static_cast<int>(Storage::kHalf));
}

// Fills a table by number: with make(Instance) of every rule, structure and storage type.
template <class R, int kStructure = 0, class Entry, class Make>
constexpr void fill_rule(Entry* table, Make make) {
  static_assert(R::kStructures <= kMaxStructures, "more structures than in rule.h");
  each_storage([&]<class T>(int type) { table[type] = make(Instance<R, kStructure, T>{}); });
  if constexpr (kStructure + 1 < R::kStructures) {
    fill_rule<R, kStructure + 1>(table + kStorages, make);
  }
}
template <class Entry, class Make, class... R>
constexpr void fill_kernels(Entry* table, Make make, List<R...>) {
  int rule = 0;
  (fill_rule<R>(table + first_kernel(rule++, 0), make), ...);
}

// The kernels of one instruction set, by number.
struct KernelTable {
  const char* instruction_set;
  Kernel by_number[kAllKernels];
  Measure squares[kStorages];
  Measure magnitude[kStorages];

  const Measure* measures(Order order) const { return order == Order::kTwo ? squares : magnitude; }
};

}  // namespace fastsgd
