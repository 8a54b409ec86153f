// What an optimizer's steps have found, besides what they have written.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cuda/devices.h"

namespace fastsgd {

class Findings {
 public:
  // The norm of a step: computed here; on a device, which `work` has; or by Python, as a tensor.
  void found(double norm, bool is_double) {
    where_ = Where::kHere;
    norm_ = norm;
    is_double_ = is_double;
  }
  void found_there(cuda::DeviceWork& work, bool is_double) {
    where_ = Where::kThere;
    work_ = &work;
    is_double_ = is_double;
  }
  void found(const at::Tensor& norm) {
    where_ = Where::kTensor;
    tensor_ = norm;
  }
  // The last one as a new tensor; undefined before there is one.
  at::Tensor grad_norm() const;

  std::int64_t skipped = 0;  // steps, without those that devices have skipped
  // How many averages a device has counted, if that is known here, and in which tensor.
  std::int64_t averages = 0;
  const c10::TensorImpl* averages_of = nullptr;
  // What a schedule said when it was last asked; and which that was, and for which average, between
  // two tries of one step.
  double decay = 0;
  const void* asked = nullptr;
  std::int64_t asked_for = 0;

 private:
  enum class Where : std::uint8_t { kNowhere, kHere, kThere, kTensor };
  Where where_ = Where::kNowhere;
  bool is_double_ = false;
  double norm_ = 0;
  cuda::DeviceWork* work_ = nullptr;
  at::Tensor tensor_;
};

}  // namespace fastsgd
