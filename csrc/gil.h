// Python's lock, given up while nothing of Python's is needed.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace fastsgd {

// Gives it up, if asked to, and takes it again after.
class WithoutGil {
 public:
  explicit WithoutGil(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ == nullptr) return;
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      // The interpreter has ended, and before Python 3.14 it unwinds a thread that wants it back.
      // What is further up would let go of objects without the GIL: this thread goes no further.
      for (;;) pause();
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fastsgd
