// What a plain tensor looks like from within: a dense tensor on some device and nothing else, so
// that its data pointer and strides say all about it.
//
// A tensor's accessors ask at each call whether the tensor has ways of its own. A step reads
// thousands of tensors that have none, and tells so by two words of each: its dispatch keys, and
// its form, which is its dtype, device and layout flags as they lie side by side. A tensor that
// equals a plain one in both is plain, whatever the single bits mean.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernel.h"

namespace fastsgd {

// What is read of a StorageImpl lies in its first bytes, up to its size; and what is read of a
// TensorImpl that only stands for another: its version, autograd's part and its Python object.
inline constexpr std::size_t kStorageBytes = 56;
inline constexpr std::size_t kHeadBytes = 56;

// The fields that torch keeps from everyone but subclasses. Never made.
class Fields : c10::TensorImpl {
 public:
  // These are for plain tensors, whose accessors say the same.
  static const c10::impl::SizesAndStrides& shape(const c10::TensorImpl& tensor) {
    return tensor.*&Fields::sizes_and_strides_;
  }
  static std::int64_t count(const c10::TensorImpl& tensor) { return tensor.*&Fields::numel_; }
  static std::int64_t offset(const c10::TensorImpl& tensor) {
    return tensor.*&Fields::storage_offset_;
  }

  // And these for all.
  static c10::AutogradMetaInterface* autograd(const c10::TensorImpl& tensor) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
    constexpr std::size_t begin = offsetof(Fields, storage_) + sizeof(c10::Storage),
                          end = offsetof(Fields, extra_meta_);
#pragma GCC diagnostic pop
    static_assert(end - begin == sizeof(void*),
                  "what lies between is autograd's, an owned pointer");
    c10::AutogradMetaInterface* meta;
    std::memcpy(&meta, reinterpret_cast<const char*>(&tensor) + begin, sizeof(meta));
    return meta;
  }
  static std::uint64_t keys(const c10::TensorImpl& tensor) { return tensor.key_set().raw_repr(); }
  static std::uint64_t form(const c10::TensorImpl& tensor) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
    constexpr std::size_t begin = offsetof(Fields, data_type_), end = offsetof(Fields, key_set_);
#pragma GCC diagnostic pop
    static_assert(end - begin == sizeof(std::uint64_t), "dtype, device and flags fill one word");
    std::uint64_t form;
    std::memcpy(&form, reinterpret_cast<const char*>(&tensor) + begin, sizeof(form));
    return form;
  }
};

// A tensor to hold what is at hand as an implementation.
inline at::Tensor tensor_of(c10::TensorImpl& tensor) {
  return at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(&tensor));
}

// For tensors that have one.
inline c10::StorageImpl* storage_of(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().unsafeGetStorageImpl();
}

// What plain tensors can be that the kernels take as they lie in memory, without gaps: contiguous
// ones of each storage type, and after these as many that are dense in another order of dimensions,
// which their strides say, as channels-last.
inline constexpr int kForms = 2 * kStorages;

// The words of those on one device.
struct Plain {
  std::uint64_t keys;            // the dispatch keys
  std::uint64_t inference_keys;  // of those made in inference mode
  std::uint64_t matters;         // the bits of a form in which they do not differ among themselves
  std::uint64_t form[kForms];

  std::uint64_t form_of(const c10::TensorImpl& tensor) const {
    return Fields::form(tensor) & matters;
  }
  // Whether a tensor is plain, of whatever dtype and layout; and one made in inference mode.
  bool is(const c10::TensorImpl& tensor) const { return Fields::keys(tensor) == keys; }
  bool is_inference(const c10::TensorImpl& tensor) const {
    return Fields::keys(tensor) == inference_keys;
  }
  // The storage type of a plain, dense tensor; kStorages for any other.
  int type_of(const c10::TensorImpl& tensor) const {
    if (Fields::keys(tensor) != keys) return kStorages;
    const int found = find(form_of(tensor));
    return found == kForms ? kStorages : found % kStorages;
  }
  // The number of a form; kForms if it is none of these.
  int find(std::uint64_t of) const {
    if (form[0] == of) [[likely]]
      return 0;
    int number = 1;
    while (number < kForms && form[number] != of) ++number;
    return number;
  }
};

// Those on the CPU.
const Plain& plain();

// Those on any device. Makes tensors there, to look at, when it is first asked; under a mode that
// would make others, what they look like is forgotten again.
Plain plain_on(c10::Device device);

}  // namespace fastsgd
