// Resets the gradients of a torch.optim.Optimizer: to None, or to zeros in one parallel pass.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "cuda/devices.h"
#include "plan.h"
#include "pydict.h"

namespace fastsgd {

class GradReset {
 public:
  // Resets those of all parameters of the groups and returns true, with the parameters in `others`
  // that are left to Python, as they or their gradients are of a class of their own; or does
  // nothing and returns false, where the groups are kept in some way of their own.
  bool reset(PyObject* groups, bool set_to_none, std::vector<Ref>& others);

  // Takes a gradient out of the graph that it is part of.
  static void detach(const at::Tensor& grad);

  // Lets go of what the last reset has kept alive.
  void release();

 private:
  void zero(Place place, const at::Tensor& slot, bool directly);
  bool add_zero(const at::Tensor& grad);

  DictKey params_{"params"};
  Plan plan_;
  cuda::Devices devices_;
  std::uint64_t cpu_keys_ = 0;  // of plain tensors for which the CPU's kernels are to work
};

}  // namespace fastsgd
