// A plan is the work of one step: which memory, by which kernel, with which scalars. It checks
// everything that could go wrong before anything is written, and knows nothing of Python's objects.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <deque>
#include <vector>

#include "alias.h"
#include "counters.h"
#include "cpu/engine.h"
#include "kernel.h"
#include "layout.h"
#include "plain.h"
#include "prefetch.h"
#include "tensors.h"

namespace fastsgd {

class Plan {
 public:
  // Of tensors that lie where `plain` says, in memory that `allocator` gives.
  explicit Plan(const Plain& plain = fastsgd::plain(),
                c10::Allocator& allocator = *c10::GetCPUAllocator())
      : counters_(plain), plain_(plain), free_(allocator.raw_deleter()) {}

  // Forgets the last step, but not the memory that it took.
  void begin();

  // Adds scalars, and returns the number by which an Update names them.
  std::int32_t add_row(const Row& row);

  // Adds the update of a parameter with `kStates` states and returns true; or false where only
  // stock's path can take it. Throws, naming `place` and the tensor, where stock could not either.
  template <int kStates>
  [[gnu::always_inline]] bool add(const Update& update, Place place, const Subject& subject,
                                  Owners owners) {
    return add_usual<kState + kStates>(update, subject, owners) ||
           add_unusual(update, place, subject, owners);
  }
  // The same for a parameter that lacks states: they are allocated into `created`.
  bool add_creating(const Update& update, Place place, Subject& subject, Owners owners,
                    const Birth& birth, at::Tensor* created);

  // Fetches what counts the writes to a parameter of as many states that is added after some more:
  // where that is other tensors than those whose memory is written, nothing else does.
  template <int kStates>
  FASTSGD_PREFETCHING void fetch_owners() const {
    c10::TensorImpl* const* ahead = &owners_[owners_used_ + kAhead * (1 + kStates)];
#pragma GCC unroll 8
    for (int i = 0; i < 1 + kStates; ++i) prefetch<kHeadBytes>(ahead[i]);
  }

  // The counters of the parameters that are added.
  Counters& counters() { return counters_; }

  // Adds a parameter that is not stepped to its average, which is the subject's first stream and
  // the parameter its second.
  bool add_average(const Update& update, Place place, const Subject& subject) {
    return add_unusual(update, place, subject, subject.tensor);
  }

  // Adds a tensor on which a kernel does its work alone: kZero, or the first of a kernel for each
  // storage type. False if its memory has gaps or is not plain.
  bool add_single(const at::Tensor& tensor, int kernel);
  // Adds a parameter and its average, both written, to exchange. The number is for messages.
  bool add_exchange(std::int64_t number, const at::Tensor& param, const at::Tensor& average);

  // Notes memory that the scalars were read from.
  void note_scalars(const std::vector<Range>& ranges) { scalars_ = ranges; }

  // Whether memory that one parameter's update writes is used by another's, so that order counts.
  // While no stream has moved the last step's answer holds.
  bool ordered();

  // Whether anything that this step uses meets memory that stock is to step. Merges `others`.
  bool meets(std::vector<Range>& others);

  // Finds the parameters whose updates write memory that another's uses, or use memory of `others`,
  // and adds them to `found`. False if memory meets either that is nobody's: what scalars were read
  // from, or counters where it is not told whose.
  bool find_meeting(const std::vector<Range>& others, std::vector<const c10::TensorImpl*>& found);

  // Keeps the step's tensors alive until it is over, those still to be added too: for when Python
  // code may run meanwhile.
  void retain();

  // The same of what run() will use, and only where it will give up the GIL. Nothing that may fail
  // is left to run() then.
  void retain_for_kernels();

  // Lets go of what these keep.
  void release();

  // What there is to do, for an engine that does it.
  bool empty() const { return used_ == 0; }
  const std::vector<Span>& spans() {
    end_spans();
    return spans_;
  }
  const Run* runs() const { return runs_.data(); }
  // Writes to the versions of what the engine writes.
  void bump_versions() const;

  // Measures the gradients; whether there are any; whether any is double.
  Measured measure(Order order);
  bool steps();
  bool any_double();

  // Writes: versions and the kernels' work, without the GIL where that is long. Work that gives one
  // result in any order need not ask for it.
  void run(const Around& around, bool needs_order);

 private:
  // What a run is of, in one number. Runs of the same memory and the same traits are the same work.
  struct Traits {
    std::uint32_t number;
    explicit Traits(const Run& run) : number(run.traits) {}
    Traits(int streams, std::int64_t item_size, bool writes_grad, bool laid_out, int wide = -1)
        : number(static_cast<std::uint32_t>(streams | item_size << 8 | writes_grad << 16 |
                                            laid_out << 17 | (wide + 1) << 18)) {}
    int wide() const { return static_cast<int>(number >> 18) - 1; }
    int streams() const { return number & 0xff; }
    int item_size() const { return number >> 8 & 0xff; }
    bool writes(int stream) const { return stream != kGrad || (number >> 16 & 1) != 0; }
  };
  // The objects behind one stream of one run.
  struct Holder {
    c10::TensorImpl* tensor;
    c10::StorageImpl* storage;
  };

  [[gnu::always_inline]] inline void note_moves(const Run& last, char* const* stream, Traits traits,
                                                const Holder& read);
  template <int kStreams>
  [[gnu::always_inline]] inline bool add_usual(const Update& update, const Subject& subject,
                                               Owners owners);
  bool add_unusual(const Update& update, Place place, const Subject& subject, Owners owners);
  bool add_checked(const Update& update, Place place, const Subject& subject, Owners owners);
  bool lay_out(const Update& update, Place place, const Subject& subject, Layout& layout);
  inline void count_in(std::int64_t bytes, Traits traits, Owners owners);
  // A run joins the last span if it has its key.
  static int span_key(int kernel, Traits traits);
  void begin_span(int kernel, std::int32_t row, const Layout* layout, Traits traits);
  void reserve() {
    if (used_ == runs_.size()) [[unlikely]]
      grow();
  }
  void end_spans();
  void grow();
  inline bool is_long() const;
  void retain(std::size_t holders, std::size_t owners);
  void retain(c10::TensorImpl* tensor);
  void retain(c10::StorageImpl* storage);
  template <class Use>
  void each_range(Use use);
  void collect_ranges();
  bool all_writes_allocated() const;
  // Whether a storage's memory is the allocator's, which gives none to two storages at once.
  bool is_allocated(c10::StorageImpl& storage) const {
    return storage._mutable_data_ptr_no_checks().get_deleter() == free_;
  }

  // Of the runs, the first `used_` are this step's; likewise of the holders, one for each stream of
  // each run, and of the owners, one for each stream that is written. What follows is left from the
  // last step: it says what to fetch ahead, and whether anything moved.
  std::vector<Run> runs_;
  std::vector<Holder> holders_;
  std::vector<c10::TensorImpl*> owners_;
  std::size_t used_ = 0, holders_used_ = 0, owners_used_ = 0;
  std::vector<Span> spans_;
  int span_key_ = kNoKernel;  // of the last span, if the next run could join it
  std::int32_t span_row_ = -1;
  std::vector<Row> rows_;
  std::deque<Layout> layouts_;  // a deque: spans point into it while it grows
  std::size_t layouts_used_ = 0;
  std::int64_t bytes_ = 0;
  Counters counters_;
  const Plain plain_;

  // What is another than at the last answer of ordered(): a stream that is written, or the number
  // of elements; one that is read; one that is read, of a tensor that stands nowhere else and is
  // alone in memory of its own.
  bool moved_ = true, read_moved_ = true, own_read_moved_ = true;
  bool ordered_ = false;
  const c10::DeleterFnPtr free_;
  std::size_t ordered_for_ = 0;  // so many runs
  std::vector<Range> writes_, reads_;
  std::vector<Range> scalars_, scalars_for_;  // at this step; those that the answer is for

  bool retaining_ = false;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> tensors_;
  std::vector<c10::intrusive_ptr<c10::StorageImpl>> storages_;
};

// The address of what a storage holds. One that is copied lazily is copied before it is written.
inline char* data_of(c10::StorageImpl& storage, bool written) {
  return static_cast<char*>(written ? storage.mutable_data() : const_cast<void*>(storage.data()));
}

// Whether a gradient stands nowhere else: as a parameter, say, or as a state. Its Python object, if
// it has one, counts as a holder, and is held by it alone unless Python code has it too; before
// torch 2.13 that could not be told.
inline bool is_alone(c10::TensorImpl& grad) {
  const std::size_t holders = c10::raw::intrusive_ptr::use_count(&grad);
  if (holders == 1) return true;
  const auto only_here = [](const auto& slot) {
    if constexpr (requires { slot.load_pyobj(); }) {
      return slot.has_unique_reference();
    } else {
      return false;
    }
  };
  return holders == 2 && only_here(*grad.pyobj_slot());
}

inline bool meet(const char* a, std::int64_t bytes_of_a, const char* b, std::int64_t bytes_of_b) {
  return a < b + bytes_of_b && b < a + bytes_of_a;
}

// Counts in a run that has been written to its place, as have its holders, of the span that was
// begun last.
void Plan::count_in(std::int64_t bytes, Traits traits, Owners owners) {
  const int streams = traits.streams();
  const std::size_t owners_before = owners_used_;
  for (int s = 0; s < streams; ++s) {
    if (traits.writes(s)) owners_[owners_used_++] = owners[s];
  }
  holders_used_ += static_cast<std::size_t>(streams);
  bytes_ += bytes * streams;
  ++used_;
  if (retaining_) [[unlikely]]
    retain(static_cast<std::size_t>(streams), owners_used_ - owners_before);
}

// Notes which streams lie elsewhere than at the last step, at which the run was as long and of the
// same traits. One is only read, unless the traits say that it is written too.
void Plan::note_moves(const Run& last, char* const* stream, Traits traits, const Holder& read) {
  for (int s = 0; s < traits.streams(); ++s) {
    if (traits.writes(s)) moved_ |= last.stream[s] != stream[s];
  }
  const bool own = is_alone(*read.tensor) && is_allocated(*read.storage) &&
                   c10::raw::intrusive_ptr::use_count(read.storage) == 1;
  (own ? own_read_moved_ : read_moved_) = true;
}

// The usual case, in few instructions: every tensor plain, dense, of one dtype and one layout, its
// storage large enough and its own, and its writes counted. False where anything differs; then
// nothing is noted.
template <int kStreams>
bool Plan::add_usual(const Update& update, const Subject& subject, Owners owners) {
  reserve();
  Holder* holders = &holders_[holders_used_];
#pragma GCC unroll 8
  for (std::size_t s = 0; s < kStreams; ++s) {
    const Holder& ahead = holders[kAhead * kStreams + s];
    prefetch<sizeof(c10::TensorImpl)>(ahead.tensor);
    prefetch<kStorageBytes>(ahead.storage);
  }

  const c10::TensorImpl& param = *subject.tensor[kParam];
  const std::uint64_t form = plain_.form_of(param);
  const int found = plain_.find(form), type = found % kStorages;
  const bool permuted = found >= kStorages;
  const std::int64_t count = Fields::count(param);
  if (found == kForms || (update.usual >> type & 1) == 0) [[unlikely]]
    return false;
  const std::int64_t item_size = kItemSizes[type], bytes = count * item_size;
  const at::IntArrayRef sizes = Fields::shape(param).sizes_arrayref(),
                        strides = Fields::shape(param).strides_arrayref();
  char* stream[kStreams];
  c10::StorageImpl* storage[kStreams];
#pragma GCC unroll 8
  for (int s = 0; s < kStreams; ++s) {
    const c10::TensorImpl& tensor = *subject.tensor[s];
    if (Fields::keys(tensor) != plain_.keys) [[unlikely]]
      return false;
    const auto& shape = Fields::shape(tensor);
    if (s != kParam &&
        (plain_.form_of(tensor) != form || !same_sizes(shape.sizes_arrayref(), sizes) ||
         (permuted && !same_sizes(shape.strides_arrayref(), strides)))) [[unlikely]]
      return false;
    storage[s] = storage_of(tensor);
    const std::int64_t offset = Fields::offset(tensor) * item_size;
    if (static_cast<std::int64_t>(storage[s]->nbytes()) < offset + bytes) [[unlikely]]
      return false;
    if (update.writes(s) && !owners[s]->version_counter().enabled()) [[unlikely]]
      return false;
    stream[s] = data_of(*storage[s], update.writes(s)) + offset;
  }

  Run& run = runs_[used_];
  const Traits traits(kStreams, item_size, update.writes_grad, false);
  const bool another = run.count != count || run.traits != traits.number;
  bool moved = another;
#pragma GCC unroll 8
  for (int s = 0; s < kStreams; ++s) moved |= run.stream[s] != stream[s];
  if (moved) [[unlikely]] {
    moved_ |= another;
    note_moves(run, stream, traits, {subject.tensor[kGrad], storage[kGrad]});
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      for (int t = 0; t < s; ++t) {
        if (meet(stream[s], bytes, stream[t], bytes)) return false;
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) run.stream[s] = stream[s];
    run.count = count;
    run.traits = traits.number;
  }
#pragma GCC unroll 8
  for (int s = 0; s < kStreams; ++s) holders[s] = {subject.tensor[s], storage[s]};
  const int kernel = update.kernel + type;
  if (kernel != span_key_ || update.row != span_row_) [[unlikely]]
    begin_span(kernel, update.row, nullptr, traits);
  count_in(bytes, traits, owners);
  return true;
}

}  // namespace fastsgd
