// Gradients are new at each iteration, so there is nothing to remember of where they lie. They are
// looked up ahead of their turn, in stages, each of which reads what an earlier one has fetched.
#pragma once

#include <Python.h>

#include "plain.h"
#include "prefetch.h"
#include "pytensor.h"

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
  FASTSGD_PREFETCHING void fetch_grad_memory(Py_ssize_t ahead) const {
    if (const void* memory = grad_memory_at(ahead)) prefetch(memory);
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
    prefetch<kCounterBytes + kNotes>(Fields::counter(*grad));
  }
  FASTSGD_PREFETCHING void fetch_memory_to_free(Py_ssize_t ahead) const {
    const void* memory = grad_memory_at(ahead);
    if (memory != nullptr) prefetch<kCacheLine + kNotes>(memory, -std::ptrdiff_t{kNotes});
  }

 private:
  static constexpr std::size_t kCounterBytes = 32;
  static constexpr std::size_t kNotes = 32;

  static c10::StorageImpl* storage_of(const c10::TensorImpl& tensor) {
    return tensor.unsafe_storage().unsafeGetStorageImpl();
  }
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

}  // namespace fastsgd
