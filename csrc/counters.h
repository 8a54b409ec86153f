// The steps of parameters: tensors of one element, to which a step adds one.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "alias.h"
#include "plain.h"
#include "prefetch.h"
#include "tensors.h"

namespace fastsgd {

class Counters {
 public:
  explicit Counters(const Plain& plain) : plain_(plain) {}

  struct Counter {
    c10::TensorImpl* tensor;
    c10::StorageImpl* storage;
    char* data;
    bool is_double;
  };

  // Forgets the last step.
  void begin() {
    used_ = 0;
    counters_.resize(std::max<std::size_t>(counters_.size(), kAhead + 1));
  }

  // What a counter will say after this step, noted as the next counter; false if it is no plain
  // float32 or float64 of one element.
  [[gnu::always_inline]] bool read(c10::TensorImpl& tensor, double& next) {
    if (!note(tensor)) [[unlikely]]
      return false;
    next = value_after(counters_[used_]);
    return true;
  }
  // The same without looking at what it says, which another device may know.
  [[gnu::always_inline]] bool note(c10::TensorImpl& tensor) {
    if (used_ + kAhead >= counters_.size()) [[unlikely]]
      counters_.resize(2 * counters_.size());
    const Counter& ahead = counters_[used_ + kAhead];
    prefetch<sizeof(c10::TensorImpl)>(ahead.tensor);
    prefetch<kStorageBytes>(ahead.storage);
    prefetch(ahead.data);
    const int type = plain_.type_of(tensor);
    if (type > 1 || Fields::count(tensor) != 1 || !tensor.version_counter().enabled()) [[unlikely]]
      return false;
    c10::StorageImpl* storage = storage_of(tensor);
    const std::int64_t item_size = kItemSizes[type];
    const std::int64_t offset = Fields::offset(tensor) * item_size;
    if (static_cast<std::int64_t>(storage->nbytes()) < offset + item_size) [[unlikely]]
      return false;
    char* data = static_cast<char*>(storage->mutable_data()) + offset;
    const Counter& last = counters_[used_];
    moved_ |= data != last.data || (type == 1) != last.is_double;
    counters_[used_] = {&tensor, storage, data, type == 1};
    return true;
  }

  // Counts on the counter that was read last.
  void keep() { ++used_; }

  // Whether the counters are others than when this was last asked, or more of them, or fewer.
  bool moved() {
    const bool as_many = std::exchange(used_before_, used_) == used_;
    return std::exchange(moved_, false) || !as_many;
  }

  void collect(std::vector<Range>& writes) const;
  std::span<const Counter> kept() const { return {counters_.data(), used_}; }

  // Writes: each counter's version; one more to each counter.
  void bump_versions() const;
  void advance() const;

 private:
  static double value_after(const Counter& counter) {
    if (counter.is_double) return *reinterpret_cast<const double*>(counter.data) + 1;
    return *reinterpret_cast<const float*>(counter.data) + 1.0f;
  }

  std::vector<Counter> counters_;
  std::size_t used_ = 0, used_before_ = 0;
  bool moved_ = true;
  const Plain plain_;
};

}  // namespace fastsgd
