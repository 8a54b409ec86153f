// A plan is the work of one step: which memory, by which kernel, with which scalars. It checks
// everything that could go wrong before anything is written, and knows nothing of Python's objects.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "alias.h"
#include "cpu/engine.h"
#include "kernel.h"
#include "layout.h"
#include "tensors.h"

namespace fastsgd {

// How some parameters are updated: those of one group, at one step of theirs.
struct Update {
  const Rule* rule = nullptr;
  const Kernel* kernels = nullptr;  // by storage type
  std::int32_t row = -1;
  bool writes_grad = false;
  StateLike state_like = StateLike::kGrad;
};

class Plan {
 public:
  // Forgets the last step, but not the memory that it took.
  void begin();

  // Adds scalars, and returns the number by which an Update names them.
  std::int32_t add_row(const Row& row);

  // Adds the update of a parameter and returns true; or false where only stock's path can take it.
  // Throws, naming `place` and the tensor, where stock could not either. The states that are
  // missing are allocated into `created`, which is null where none are.
  bool add(const Update& update, const Place& place, Subject& subject, at::Tensor* created) {
    if (created == nullptr && subject.streams == 2 && add_usual<2>(update, subject)) return true;
    if (created == nullptr && subject.streams == 3 && add_usual<3>(update, subject)) return true;
    moved_ = true;  // what follows may write to the place of another run, and then refuse
    return add_unusual(update, place, subject, created);
  }

  // Adds a gradient to set to zero; false if its memory has gaps or is not plain.
  bool add_zero(const at::Tensor& grad);

  // Whether memory that one parameter's update writes is used by another's, so that order counts.
  // While no stream has moved the last step's answer holds.
  bool ordered();

  // Whether anything that this step uses meets memory that stock is to step. Merges `others`.
  bool meets(std::vector<Range>& others);

  // Keeps the step's tensors alive until it is over, those still to be added too: for when Python
  // code may run meanwhile.
  void retain();

  // Lets go of what retain() keeps.
  void release();

  // Writes: version counters first, then the kernels, without the GIL where the work is long. Work
  // that gives one result in any order need not ask for it.
  void run(bool needs_order);

 private:
  // The objects behind one stream of one run, and its bytes from the first element to the last.
  struct Owner {
    c10::TensorImpl* tensor;
    c10::StorageImpl* storage;
    std::int64_t bytes;
  };

  template <int kStreams>
  [[gnu::noinline]] bool add_usual(const Update& update, const Subject& subject);
  bool add_unusual(const Update& update, const Place& place, Subject& subject, at::Tensor* created);
  bool lay_out(const Update& update, const Place& place, const Subject& subject, Layout& layout);
  void count_in(const Update& update, Kernel kernel, const Layout* layout, int item_size,
                int streams);
  void reserve() {
    if (used_ == reserved_) grow();
  }
  void grow();
  void fetch_ahead(int streams) const;
  void retain(std::size_t first_owner, int streams);
  void retain_storages();

  // Of the runs, the first `used_` are this step's, and the next is written in place before it
  // counts; likewise the owners, one for each stream of each run. What follows is left from the
  // last step: it says what to fetch ahead, and whether anything moved.
  std::vector<Run> runs_;
  std::vector<Owner> owners_;
  std::vector<c10::TensorImpl*> written_;
  std::size_t used_ = 0, owners_used_ = 0, written_used_ = 0, reserved_ = 0;
  std::vector<Span> spans_;
  std::vector<Row> rows_;
  std::deque<Layout> layouts_;  // a deque: spans point into it while it grows
  std::size_t layouts_used_ = 0;
  std::int64_t bytes_ = 0;
  const std::uint64_t plain_keys_ = plain_keys();

  void collect_ranges();

  bool moved_ = true;  // a run is another than at the last step
  bool ordered_ = false;
  std::size_t ordered_for_ = 0;  // so many runs
  std::vector<Range> writes_, reads_;

  bool retaining_ = false;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> retained_;
  std::vector<c10::intrusive_ptr<c10::StorageImpl>> storages_;
};

}  // namespace fastsgd
