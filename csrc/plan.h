// A plan is the work of one step: which memory, by which kernel, with which scalars. It checks
// everything that could go wrong before anything is written, and knows nothing of Python.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "alias.h"
#include "cpu/engine.h"
#include "kernel.h"
#include "layout.h"

namespace fastsgd {

// Where a parameter stands, for messages.
struct Place {
  std::int64_t group, index;
};

// A parameter as a rule sees it. `state[i]` is null where this step creates the state.
struct Subject {
  c10::TensorImpl* param;
  const at::Tensor* grad;
  c10::TensorImpl* state[kMaxStates];
  int states;
};

class Plan {
 public:
  // Forgets the last step, but not the memory that it took.
  void begin();

  // Adds scalars, and returns the number by which add() knows them.
  std::int32_t add_row(const Row& row);

  // Adds a parameter's update and returns true; or false where only stock's path can take it. Throws,
  // naming `place` and the tensor, where stock could not either. Allocates the states that are missing
  // into `created`.
  bool add(const Place& place, const Rule& rule, const Kernel (&kernels)[kStorages],
           std::int32_t row, const Subject& subject, at::Tensor* created);

  // Adds a gradient to set to zero; false if it does not lie flat.
  bool add_zero(const at::Tensor& grad);

  // Whether memory that one parameter's update writes is used by another's, so that order counts.
  bool ordered();

  // Keeps every tensor and storage of this step alive until the next begin(), those to come included:
  // for when Python code may run, or another thread.
  void retain();

  bool empty() const { return used_ == 0; }

  // Writes. Version counters first, then the kernels, without the GIL when the work is long.
  void run();

 private:
  struct Owners {
    c10::TensorImpl* stream[kMaxStreams];
    int streams;
    bool writes_grad;
  };

  void push(const Work& work, const Owners& owners);
  bool lay_out(const Place& place, const Rule& rule, const Owners& owners, bool unscale, Work& work,
               std::int64_t* extents);
  void retain(const Owners& owners);

  std::vector<Work> work_;
  std::vector<Owners> owners_;
  std::size_t used_ = 0;
  std::vector<Row> rows_;
  std::deque<Layout> layouts_;  // a deque: work points into it while it grows
  std::size_t layouts_used_ = 0;
  std::int64_t bytes_ = 0;
  AliasFinder aliases_;
  bool retaining_ = false;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> retained_;
  std::vector<c10::Storage> storages_;
};

}  // namespace fastsgd
