#include "findings.h"

#include <ATen/ops/scalar_tensor.h>

namespace fastsgd {

at::Tensor Findings::grad_norm() const {
  switch (where_) {
    case Where::kHere:
      return at::scalar_tensor(norm_, is_double_ ? at::kDouble : at::kFloat);
    case Where::kThere:
      return work_->norm(is_double_);
    case Where::kTensor:
      return tensor_.clone();
    case Where::kNowhere:
      break;
  }
  return {};
}

}  // namespace fastsgd
