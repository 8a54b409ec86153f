// What the kernels can take of a tensor, what only stock's path can, and what no path can: then a
// sentence says where and why.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "alias.h"
#include "plain.h"
#include "update.h"

namespace fastsgd {

// How the kernels call the tensor's dtype, if they know it.
inline std::optional<Storage> storage_type(const c10::TensorImpl& tensor) {
  const caffe2::TypeMeta type = tensor.dtype();
  if (type.Match<float>()) return Storage::kFloat;
  if (type.Match<double>()) return Storage::kDouble;
  if (type.Match<at::BFloat16>()) return Storage::kBFloat16;
  if (type.Match<at::Half>()) return Storage::kHalf;
  return std::nullopt;
}

// The dtype of a parameter's average.
inline caffe2::TypeMeta average_type(const Update& update, const c10::TensorImpl& param) {
  const bool half = param.dtype().itemsize() == 2;
  return update.wide && half ? caffe2::TypeMeta::Make<float>() : param.dtype();
}

// A new average: the parameter as it is.
at::Tensor new_average(const Update& update, const at::Tensor& param);

inline constexpr std::int16_t kItemSizes[kStorages] = {4, 8, 2, 2};

inline bool same_sizes(at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (std::size_t d = 0; d < a.size(); ++d) {  // few: cheaper than a call to compare memory
    if (a[d] != b[d]) return false;
  }
  return true;
}

// Whether equal indices lie at equal distances from the first element, and no others between.
bool same_layout(const c10::TensorImpl& a, const c10::TensorImpl& b);

// "param_groups[0]['params'][3]"; where a group is -1, it is of those that have an average.
std::string at_place(Place place);
// "its grad", "its state 'momentum_buffer'".
std::string stream_name(const Structure& structure, int stream);

// Whether kernels can take the tensors of a parameter: plain ones of one dtype and one shape, on
// their device.
// Throws where stock could not take them either.
bool check_kinds(const Plain& plain, Place place, const Update& update, const Subject& subject,
                 Owners owners);

// Throws where stock could not count a step with this tensor.
void check_counter(Place place, const c10::TensorImpl& counter);

// Whether memory is there for all elements of a tensor; true where only the tensor itself can tell.
bool has_memory(const c10::TensorImpl& tensor);
// Whether several elements are one in memory, as expand() has it; false where only the tensor can
// tell.
bool is_expanded(const c10::TensorImpl& tensor);
// Why a gradient cannot be cleared by zeros, to follow its name and go before the cure; empty if
// nothing is known against it.
std::string why_not_zeroed(const at::Tensor& grad);
// Why a tensor cannot be written, to follow its name; empty if nothing is known against it.
std::string why_not_written(const c10::TensorImpl& tensor);
// The memory in which the elements of a tensor with a storage lie; all of that where only the
// tensor itself can tell.
Range reach(const c10::TensorImpl& tensor);
// `what`: "param_groups[0]['params'][3]: the storage of its grad".
[[noreturn]] void storage_too_small(const std::string& what, const c10::TensorImpl& tensor);
[[noreturn]] void written_but_expanded(Place place, const Structure& structure, int stream);

}  // namespace fastsgd
