// Parameters that are neither plain tensors nor distributed ones. Which of them have a gradient
// only they can say, and asking may run Python code: so it is done before a walk, once it is known
// that there are any.
#pragma once

#include <Python.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "pydict.h"

namespace fastsgd {

class Strangers {
 public:
  // For a step, which may walk more than once.
  void begin_step() { asked_in_step_ = false; }
  void begin_walk() {
    met_ = false;
    next_ = 0;
  }
  // Lets go of what was asked.
  void end_step() { answers_.clear(); }

  // Whether the last walk has met any, and nothing was asked for this step yet; and asks all those
  // in the groups.
  bool asks() const { return met_ && !asked_in_step_; }
  void answer(PyObject* groups);

  // What one has answered. One that was not asked goes to stock, which asks itself.
  bool has_grad(PyObject* param);

 private:
  DictKey params_{"params"};
  bool met_ = false, asked_in_step_ = false;
  std::vector<std::pair<Ref, bool>> answers_;
  std::size_t next_ = 0;  // answer, if nothing was moved by answering
};

}  // namespace fastsgd
