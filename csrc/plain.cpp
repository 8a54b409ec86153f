#include "plain.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>

#include <new>
#include <unordered_map>
#include <vector>

#include "modes.h"

namespace fastsgd {
namespace {

constexpr at::ScalarType kTypes[kStorages] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

constexpr std::int64_t kShape[] = {2, 3}, kInOrder[] = {3, 1}, kPermuted[] = {1, 2};
using Sizes = std::vector<std::int64_t>;

// Made without the dispatcher, here and below: a mode may be on that would make something else.
at::TensorBase contiguous(at::IntArrayRef sizes, at::ScalarType type) {
  return at::detail::empty_cpu(sizes, type);
}
at::TensorBase strided(at::IntArrayRef strides, at::IntArrayRef sizes = kShape,
                       at::ScalarType type = at::kFloat) {
  return at::detail::empty_strided_cpu(sizes, strides, type);
}

std::uint64_t form_of(const at::TensorBase& tensor) {
  return Fields::form(*tensor.unsafeGetTensorImpl());
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

// The bits that say whether a tensor lies channels-last, as a contiguous one does too where some
// sizes are 1. No kernel asks.
std::uint64_t channels_last() {
  std::uint64_t differing = 0;
  const std::uint64_t in_order = form_of(contiguous(kShape, at::kFloat));
  for (const Sizes& sizes :
       {Sizes{2, 3, 4, 5}, Sizes{2, 1, 4, 5}, Sizes{2, 3, 1, 1}, Sizes{1, 1, 1, 1},
        Sizes{2, 3, 4, 5, 6}, Sizes{2, 1, 4, 5, 6}, Sizes{2, 3, 1, 1, 1}, Sizes{1, 1, 1, 1, 1}}) {
    differing |= in_order ^ form_of(contiguous(sizes, at::kFloat));
  }
  const std::uint64_t permuted = form_of(strided(kPermuted));
  differing |= permuted ^ form_of(strided({60, 1, 15, 3}, {2, 3, 4, 5}));
  differing |= permuted ^ form_of(strided({360, 1, 90, 18, 3}, {2, 3, 4, 5, 6}));
  return differing;
}

// Learns the words of tensors of kShape that make(strides, type) makes.
template <class Make>
void learn(Plain& plain, Make make) {
  const c10::InferenceMode normal(false);
  for (int number = 0; number < kForms; ++number) {
    const auto& strides = number < kStorages ? kInOrder : kPermuted;
    const at::TensorBase tensor = make(strides, kTypes[number % kStorages]);
    plain.keys = Fields::keys(*tensor.unsafeGetTensorImpl());
    plain.form[number] = plain.form_of(*tensor.unsafeGetTensorImpl());
  }
  const c10::InferenceMode inference;
  plain.inference_keys = Fields::keys(*make(kInOrder, at::kFloat).unsafeGetTensorImpl());
}

Plain learn_here() {
  Plain plain;
  plain.matters = ~(channels_last() | padding());
  learn(plain, [](at::IntArrayRef strides, at::ScalarType type) {
    return strided(strides, kShape, type);
  });
  return plain;
}

}  // namespace

Plain plain_on(c10::Device device) {
  if (device.is_cpu()) return plain();
  static auto& known = *new std::unordered_map<c10::Device, Plain>;
  if (const auto found = known.find(device); found != known.end()) return found->second;
  Plain there = plain();
  learn(there, [&](at::IntArrayRef strides, at::ScalarType type) {
    return at::empty_strided(kShape, strides, at::device(device).dtype(type));
  });
  if (!any_mode()) known.emplace(device, there);
  return there;
}

const Plain& plain() {
  static const Plain learned = learn_here();
  return learned;
}

}  // namespace fastsgd
