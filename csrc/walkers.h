// The walkers of one optimizer: a second one works while the first is busy.
#pragma once

#include <Python.h>

#include <memory>
#include <vector>

#include "findings.h"
#include "walk.h"

namespace fastsgd {

class Walkers {
 public:
  // One that is not busy, for a step of `optimizer`, whose walkers these are.
  Walker& idle(PyObject* optimizer);

  // What the last step with a norm measured, as a new tensor; undefined before. And how many steps
  // were skipped. A step may be under way.
  at::Tensor grad_norm() const { return findings_.grad_norm(); }
  std::int64_t skipped_steps() const;
  // What the schedule of the averages has said, for Python to use.
  double decay() const { return findings_.decay; }
  // The same of a step of which Python took a part.
  void note(const at::Tensor& grad_norm, bool skipped);

 private:
  void read_class(PyObject* optimizer);

  // Of the optimizer's class when it was last read: which rule it steps by, and what of it
  // only stock understands.
  const PyTypeObject* type_ = nullptr;
  unsigned int version_ = 0;
  int rule_ = -1;
  Foreign foreign_ = Foreign::kNothing;
  Findings findings_;
  std::vector<std::unique_ptr<Walker>> all_;
};

}  // namespace fastsgd
