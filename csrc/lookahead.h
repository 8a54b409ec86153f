// Gradients are new at each iteration, so there is nothing to remember of where they lie. They are
// looked up ahead of their turn, in stages, each of which reads what an earlier one has fetched.
#pragma once

#include <Python.h>

#include "plain.h"
#include "prefetch.h"
#include "pytensor.h"
#include "version.h"

namespace fastsgd {

// The parameters of a list or tuple that come after the one whose turn it is. `ahead` counts them.
class Lookahead {
 public:
  Lookahead(PyObject* params, Py_ssize_t turn)
      : items_(PySequence_Fast_ITEMS(params) + turn),
        left_(PySequence_Fast_GET_SIZE(params) - turn) {}

  FASTSGD_PREFETCHING void fetch_object(Py_ssize_t ahead) const {
    if (ahead < left_) prefetch(items_[ahead]);
  }
  FASTSGD_PREFETCHING void fetch_param(Py_ssize_t ahead) const {
    if (const auto* param = param_at(ahead)) prefetch(param);
  }
  FASTSGD_PREFETCHING void fetch_grad_slot(Py_ssize_t ahead) const {
    if (const auto* param = param_at(ahead)) prefetch(grad_slot(*param));
  }
  FASTSGD_PREFETCHING void fetch_grad(Py_ssize_t ahead) const {
    if (const auto* grad = grad_at(ahead)) prefetch<sizeof(c10::TensorImpl)>(grad);
  }
  FASTSGD_PREFETCHING void fetch_grad_storage(Py_ssize_t ahead) const {
    if (const auto* grad = grad_at(ahead)) prefetch<kStorageBytes>(storage_of(*grad));
  }

  // What is freed with a gradient: its parts, and the allocator's notes, which lie beside each. Of
  // its memory a line is enough, as nobody reads it.
  FASTSGD_PREFETCHING void fetch_grad_to_free(Py_ssize_t ahead) const {
    if (const auto* grad = grad_at(ahead)) prefetch<sizeof(c10::TensorImpl) + kNotes>(grad);
  }
  FASTSGD_PREFETCHING void fetch_parts_to_free(Py_ssize_t ahead) const {
    const auto* grad = grad_at(ahead);
    if (grad == nullptr) return;
    prefetch<sizeof(c10::StorageImpl) + kNotes>(storage_of(*grad));
    prefetch<kCounterBytes + kNotes>(version_of(*grad), -kVersionAt);
  }
  FASTSGD_PREFETCHING void fetch_memory_to_free(Py_ssize_t ahead) const {
    const void* memory = grad_memory_at(ahead);
    if (memory != nullptr) prefetch<kCacheLine + kNotes>(memory, -std::ptrdiff_t{kNotes});
  }

 private:
  static constexpr std::size_t kCounterBytes = 32;
  static constexpr std::ptrdiff_t kVersionAt = sizeof(c10::intrusive_ptr_target);
  static constexpr std::size_t kNotes = 32;

  const c10::TensorImpl* param_at(Py_ssize_t ahead) const {
    return ahead < left_ && exact_tensor(items_[ahead]) ? impl_of(items_[ahead]) : nullptr;
  }
  const c10::TensorImpl* grad_at(Py_ssize_t ahead) const {
    const auto* param = param_at(ahead);
    const at::Tensor* grad = param == nullptr ? nullptr : grad_slot(*param);
    return grad == nullptr ? nullptr : grad->unsafeGetTensorImpl();
  }
  const void* grad_memory_at(Py_ssize_t ahead) const {
    const auto* grad = grad_at(ahead);
    auto* storage = grad == nullptr ? nullptr : storage_of(*grad);
    return storage == nullptr ? nullptr : storage->_mutable_data_ptr_no_checks().get();
  }

  PyObject* const* items_;
  Py_ssize_t left_;
};

// The parameters of a list one after the other, for whoever does little with each but read its
// gradient: what one stage has found is kept for the next, as finding it takes as long as its use.
class GradsAhead {
 public:
  struct Found {
    const c10::TensorImpl* param = nullptr;  // null if it is no exact tensor
    const at::Tensor* slot = nullptr;        // for its gradient; null if it has none
    c10::TensorImpl* grad = nullptr;
    c10::StorageImpl* storage = nullptr;  // of the gradient
  };

  explicit GradsAhead(PyObject* params)
      : items_(PySequence_Fast_ITEMS(params)),
        size_(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(params))) {
    for (std::size_t i = 0; i < kStages * kStage; ++i) advance();
  }

  FASTSGD_PREFETCHING const Found& next() {
    advance();
    return found(kStages);
  }

 private:
  static constexpr std::size_t kStages = 5, kStage = 4, kKept = 32;
  static_assert(kStages * kStage < kKept);

  // What has come to a stage: the first of it was found `stage` * kStage turns ago. Before there
  // were so many, the number wraps around to entries that are still empty.
  Found& found(std::size_t stage) { return found_[(last_ - stage * kStage) % kKept]; }

  FASTSGD_PREFETCHING void advance() {
    ++last_;
    Found& first = found(0);
    first = {};
    if (last_ < size_ && exact_tensor(items_[last_])) {
      first.param = impl_of(items_[last_]);
      prefetch(first.param);
    }
    Found& second = found(1);
    if (second.param != nullptr) {
      second.slot = grad_slot(*second.param);
      prefetch(second.slot);
    }
    Found& third = found(2);
    if (third.slot != nullptr) {
      third.grad = third.slot->unsafeGetTensorImpl();
      prefetch<sizeof(c10::TensorImpl)>(third.grad);
    }
    Found& fourth = found(3);
    if (fourth.grad != nullptr) {
      fourth.storage = storage_of(*fourth.grad);
      prefetch<kStorageBytes>(fourth.storage);
      prefetch(object_of(*fourth.grad));
    }
    Found& fifth = found(4);
    if (fifth.storage != nullptr) prefetch(fifth.storage->_mutable_data_ptr_no_checks().get());
  }

  PyObject* const* items_;
  std::size_t size_, last_ = std::size_t(-1);
  Found found_[kKept];
};

}  // namespace fastsgd
