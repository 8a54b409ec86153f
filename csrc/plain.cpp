#include "plain.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <new>
#include <vector>

namespace fastsgd {
namespace {

constexpr at::ScalarType kTypes[kStorages] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

// Made without the dispatcher, as a mode may be on that would make something else.
at::TensorBase contiguous(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_cpu(sizes, type);
}

// The bits that no constructor writes, found by making a tensor where all bits are 0, and all 1.
std::uint64_t padding() {
  const auto form_over = [](int byte) {
    alignas(c10::TensorImpl) unsigned char memory[sizeof(c10::TensorImpl)];
    std::memset(memory, byte, sizeof(memory));
    auto* tensor = new (memory) c10::TensorImpl(c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                caffe2::TypeMeta::Make<float>(), at::kCPU);
    const std::uint64_t form = Fields::form(*tensor);
    tensor->~TensorImpl();
    return form;
  };
  return form_over(0x00) ^ form_over(0xff);
}

// The bits that say whether a contiguous tensor lies channels-last too, as it does where some sizes
// are 1. No kernel asks.
std::uint64_t channels_last() {
  std::uint64_t differing = 0;
  const std::uint64_t form = Fields::form(*contiguous({2}, at::kFloat).unsafeGetTensorImpl());
  const std::vector<std::int64_t> shapes[] = {{2, 3, 4, 5},    {2, 1, 4, 5},    {2, 3, 1, 1},
                                              {1, 1, 1, 1},    {2, 3, 4, 5, 6}, {2, 1, 4, 5, 6},
                                              {2, 3, 1, 1, 1}, {1, 1, 1, 1, 1}};
  for (const std::vector<std::int64_t>& sizes : shapes) {
    differing |= form ^ Fields::form(*contiguous(sizes, at::kFloat).unsafeGetTensorImpl());
  }
  return differing;
}

Plain learn() {
  Plain plain;
  const c10::InferenceMode normal(false);
  plain.matters = ~(channels_last() | padding());
  for (int type = 0; type < kStorages; ++type) {
    const at::TensorBase tensor = contiguous({2, 3}, kTypes[type]);
    plain.keys = Fields::keys(*tensor.unsafeGetTensorImpl());
    plain.form[type] = plain.form_of(*tensor.unsafeGetTensorImpl());
  }
  const c10::InferenceMode inference;
  plain.inference_keys = Fields::keys(*contiguous({2}, at::kFloat).unsafeGetTensorImpl());
  return plain;
}

}  // namespace

Plain plain_on(c10::Device device) {
  Plain there = plain();
  if (device.is_cpu()) return there;
  const auto empty = [&](at::ScalarType type) {
    return at::empty({2, 3}, at::TensorOptions().dtype(type).device(device));
  };
  const c10::InferenceMode normal(false);
  for (int type = 0; type < kStorages; ++type) {
    const at::Tensor tensor = empty(kTypes[type]);
    there.keys = Fields::keys(*tensor.unsafeGetTensorImpl());
    there.form[type] = there.form_of(*tensor.unsafeGetTensorImpl());
  }
  const c10::InferenceMode inference;
  there.inference_keys = Fields::keys(*empty(at::kFloat).unsafeGetTensorImpl());
  return there;
}

const Plain& plain() {
  static const Plain learned = learn();
  return learned;
}

}  // namespace fastsgd
