#include "plan.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/neg.h>

#include <algorithm>

#include "gil.h"
#include "version.h"

namespace fastsgd {
namespace {

constexpr std::int64_t kWorthTheGil = 8 << 20;  // bytes: about a millisecond
// Bytes of one tensor: what work over fewer takes is less than the walk took, which has to have the
// GIL, and not much more than counting a holder in and out.
constexpr std::int64_t kWorthHolding = 4 << 10;

// A tensor for a state, its memory laid out as stock's operators would lay it out.
at::Tensor empty_state(const Birth& birth, c10::TensorImpl& param, c10::TensorImpl& grad) {
  if (birth.how == NewState::kFilled) {
    return at::empty_like(tensor_of(param), at::TensorOptions().requires_grad(false));
  }
  const at::Tensor g = tensor_of(grad);
  const bool alike = grad.is_contiguous() && grad.strides() == param.strides();
  if (alike || (!birth.adds_param && !birth.maximize)) return at::empty_like(g);
  const auto shape_of = [](const c10::TensorImpl& tensor) {
    return at::empty_strided(tensor.sizes(), tensor.strides(), at::device(at::kMeta));
  };
  at::Tensor like = shape_of(grad);
  if (birth.maximize) like = at::neg(like);
  if (birth.adds_param) like = at::add(like, shape_of(param));
  return at::empty_strided(like.sizes(), like.strides(), g.options().requires_grad(false));
}

// The same with what it begins as, unless that is a copy of the gradient, which the step makes.
at::Tensor new_state(const Birth& birth, c10::TensorImpl& param, c10::TensorImpl& grad) {
  at::Tensor state = empty_state(birth, param, grad);
  if (birth.how != NewState::kFilled) return state;
  if (!state.is_cpu()) return state.fill_(birth.fill);
  fill(state.mutable_data_ptr(), state.numel(), *storage_type(param), birth.fill);
  return state;
}

}  // namespace

// Those with a stream of float32 are in spans of their own.
int Plan::span_key(int kernel, Traits traits) {
  return traits.wide() < 0 ? kernel : kernel + kAllKernels;
}

void Plan::begin() {
  used_ = holders_used_ = owners_used_ = layouts_used_ = 0;
  bytes_ = 0;
  counters_.begin();
  scalars_.clear();
  spans_.clear();
  span_key_ = kNoKernel;
  rows_.clear();
  reserve();
  release();
}

std::int32_t Plan::add_row(const Row& row) {
  rows_.push_back(row);
  return static_cast<std::int32_t>(rows_.size() - 1);
}

// --- adding -------------------------------------------------------------------------------------

void Plan::grow() {
  const std::size_t runs = 2 * runs_.size() + 8;
  holders_.resize((runs + kAhead) * kMaxStreams);
  owners_.resize((runs + kAhead + 1) * kMaxStreams);
  runs_.resize(runs);  // last: reserve() goes by its size, and the others may fail
}

bool Plan::add_unusual(const Update& update, Place place, const Subject& subject, Owners owners) {
  return check_kinds(plain_, place, update, subject, owners) &&
         add_checked(update, place, subject, owners);
}

bool Plan::add_creating(const Update& update, Place place, Subject& subject, Owners owners,
                        const Birth& birth, at::Tensor* created) {
  if (!check_kinds(plain_, place, update, subject, owners)) return false;
  for (int s = kState; s < subject.streams; ++s) {
    if (subject.tensor[s] != nullptr) continue;
    c10::TensorImpl& param = *subject.tensor[kParam];
    created[s - kState] = s - kState == update.structure->average
                              ? new_average(update, tensor_of(param))
                              : new_state(birth, param, *subject.tensor[kGrad]);
    subject.tensor[s] = created[s - kState].unsafeGetTensorImpl();
  }
  return add_checked(update, place, subject, owners);
}

// Adds tensors of one dtype and one shape, whatever their layouts.
bool Plan::add_checked(const Update& update, Place place, const Subject& subject, Owners owners) {
  reserve();
  const c10::TensorImpl& param = *subject.tensor[kParam];
  const std::int64_t count = param.numel();

  bool flat = true;
  for (int s = kGrad; s < subject.streams; ++s) flat &= same_layout(param, *subject.tensor[s]);
  flat |= count == 0;
  if (layouts_used_ == layouts_.size()) layouts_.emplace_back();
  Layout& layout = layouts_[layouts_used_];
  if (!flat && !lay_out(update, place, subject, layout)) return false;

  const int type = static_cast<int>(*storage_type(param));
  const std::int64_t item_size = kItemSizes[type];
  const int average = update.structure->average < 0 ? -1 : kState + update.structure->average;
  const bool is_wide = average >= 0 && subject.tensor[average]->dtype() != param.dtype();
  const Traits traits(subject.streams, item_size, update.writes_grad, !flat,
                      is_wide ? average : -1);
  Run run;
  run.count = count;
  run.traits = traits.number;
  Holder* holders = &holders_[holders_used_];
  std::int64_t bytes[kMaxStreams];
  const Run& last = runs_[used_];
  const bool another = !flat || last.count != count || last.traits != run.traits;
  bool moved = another;
  for (int s = 0; s < subject.streams; ++s) {
    c10::TensorImpl& tensor = *subject.tensor[s];
    c10::StorageImpl* storage = storage_of(tensor);
    const auto size = static_cast<std::int64_t>(tensor.itemsize());
    bytes[s] = (flat ? count : layout.extent(s)) * size;
    const std::int64_t offset = tensor.storage_offset() * size;
    if (count > 0 && static_cast<std::int64_t>(storage->nbytes()) < offset + bytes[s]) {
      storage_too_small(
          c10::str(at_place(place), ": the storage of ", stream_name(*update.structure, s)),
          tensor);
    }
    run.stream[s] = data_of(*storage, update.writes(s)) + offset;
    moved |= run.stream[s] != last.stream[s];
    holders[s] = {&tensor, storage};
  }
  if (moved) {
    moved_ |= another;
    note_moves(last, run.stream, traits, holders[kGrad]);
    // Streams of one parameter that share memory: only stock's order of passes gives its result.
    for (int s = 0; s < subject.streams; ++s) {
      for (int t = 0; t < s; ++t) {
        if (meet(run.stream[s], bytes[s], run.stream[t], bytes[t])) return false;
      }
    }
    runs_[used_] = run;
  }
  if (!flat) ++layouts_used_;
  const int kernel = update.kernel + type;
  if (!flat || span_key(kernel, traits) != span_key_ || update.row != span_row_) {
    begin_span(kernel, update.row, flat ? nullptr : &layout, traits);
  }
  if (is_wide) bytes_ += count * (static_cast<std::int64_t>(sizeof(float)) - item_size);
  count_in(count * item_size, traits, owners);
  return true;
}

// Begins a span with the next run; it ends where another begins.
void Plan::begin_span(int kernel, std::int32_t row, const Layout* layout, Traits traits) {
  const auto first = static_cast<std::int64_t>(used_);
  spans_.push_back({kernel, layout, row, static_cast<std::int16_t>(traits.item_size()),
                    static_cast<std::int8_t>(traits.streams()),
                    static_cast<std::int8_t>(traits.wide()), first, first});
  span_key_ = layout == nullptr ? span_key(kernel, traits) : kNoKernel;
  span_row_ = row;
}

void Plan::end_spans() {
  auto end = static_cast<std::int64_t>(used_);
  for (auto span = spans_.rbegin(); span != spans_.rend(); ++span) {
    span->end = end;
    end = span->first;
  }
}

// Finds the one order in which to visit streams that are laid out differently, and checks that what
// is written is written once. False for stock's path.
bool Plan::lay_out(const Update& update, Place place, const Subject& subject, Layout& layout) {
  const c10::TensorImpl& param = *subject.tensor[kParam];
  if (param.dim() > kMaxDims) return false;
  layout.dims = static_cast<int>(param.dim());
  for (int d = 0; d < layout.dims; ++d) {
    layout.size[d] = param.sizes()[d];
    for (int s = 0; s < subject.streams; ++s) layout.stride[d][s] = subject.tensor[s]->strides()[d];
  }
  layout.simplify(subject.streams);
  for (int s = 0; s < subject.streams; ++s) {
    if (!update.writes(s)) continue;
    for (int d = 0; d < layout.dims; ++d) {
      if (layout.stride[d][s] == 0) written_but_expanded(place, *update.structure, s);
    }
    if (!layout.injective(s)) return false;
  }
  return true;
}

bool Plan::add_single(const at::Tensor& single, int kernel) {
  c10::TensorImpl& tensor = *single.unsafeGetTensorImpl();
  if (Fields::keys(tensor) != plain_.keys || !tensor.is_non_overlapping_and_dense() ||
      !tensor.version_counter().enabled()) {
    return false;
  }
  c10::StorageImpl* storage = storage_of(tensor);
  const auto item_size = static_cast<std::int64_t>(tensor.itemsize());
  const std::int64_t offset = tensor.storage_offset() * item_size,
                     bytes = tensor.numel() * item_size;
  if (static_cast<std::int64_t>(storage->nbytes()) < offset + bytes) return false;
  const bool in_bytes = kernel == kZero;
  if (!in_bytes) {
    const auto type = storage_type(tensor);
    if (!type) return false;
    kernel += static_cast<int>(*type);
  }
  if (rows_.empty()) rows_.emplace_back();
  reserve();
  moved_ = true;
  runs_[used_].stream[kParam] = data_of(*storage, true) + offset;
  runs_[used_].count = in_bytes ? bytes : tensor.numel();
  const Traits traits(1, in_bytes ? 1 : item_size, false, false);
  runs_[used_].traits = traits.number;
  c10::TensorImpl* const owner = &tensor;
  holders_[holders_used_] = {&tensor, storage};
  if (kernel != span_key_) begin_span(kernel, 0, nullptr, traits);
  count_in(bytes, traits, &owner);
  return true;
}

bool Plan::add_exchange(std::int64_t number, const at::Tensor& param, const at::Tensor& average) {
  static constexpr Structure kBoth{.before_states = {"its data", "its state 'ema'"}};
  if (rows_.empty()) rows_.emplace_back();
  const Update update{&kBoth, kExchange, 0, true};
  const Subject subject{{param.unsafeGetTensorImpl(), average.unsafeGetTensorImpl()}, 2};
  return add_unusual(update, {-1, number}, subject, subject.tensor);
}

// --- running ------------------------------------------------------------------------------------

// Calls use(range, run, whether it is written) for each stream of each run.
template <class Use>
void Plan::each_range(Use use) {
  end_spans();
  for (const Span& span : spans_) {
    for (std::int64_t r = span.first; r < span.end; ++r) {
      const Run& run = runs_[static_cast<std::size_t>(r)];
      const Traits traits(run);
      for (int s = 0; s < span.streams; ++s) {
        const std::int64_t items = span.layout != nullptr ? span.layout->extent(s) : run.count;
        if (items == 0) continue;
        const auto begin = reinterpret_cast<std::uintptr_t>(run.stream[s]);
        const Range range{begin, begin + static_cast<std::uintptr_t>(items * span.size_of(s))};
        use(range, r, traits.writes(s));
      }
    }
  }
}

void Plan::collect_ranges() {
  writes_.clear();
  reads_.clear();
  counters_.collect(writes_);
  reads_.insert(reads_.end(), scalars_.begin(), scalars_.end());
  each_range([&](const Range& range, std::int64_t, bool writes) {
    (writes ? writes_ : reads_).push_back(range);
  });
}

bool Plan::find_meeting(const std::vector<Range>& others,
                        std::vector<const c10::TensorImpl*>& found) {
  constexpr std::int64_t kOthers = -1, kOwn = -2;
  std::vector<Use> uses;
  each_range([&](const Range& range, std::int64_t run, bool writes) {
    uses.push_back({range, run, writes});
  });
  for (const Range& range : others) uses.push_back({range, kOthers, true});
  std::vector<Range> counters;
  counters_.collect(counters);
  const bool one_a_run = counters.size() == used_;  // and not of some that are only averaged
  if (!one_a_run && any_meet(counters, {})) return false;
  for (std::size_t i = 0; i < counters.size(); ++i) {
    uses.push_back({counters[i], one_a_run ? static_cast<std::int64_t>(i) : kOwn, true});
  }
  for (const Range& range : scalars_) uses.push_back({range, kOwn, false});
  const std::vector<std::int64_t> meeting = fastsgd::find_meeting(uses);
  if (!meeting.empty() && meeting.front() == kOwn) return false;
  std::size_t holder = 0, run = 0;
  for (const std::int64_t number : meeting) {
    if (number == kOthers) continue;
    for (; run < static_cast<std::size_t>(number); ++run) {
      holder += static_cast<std::size_t>(Traits(runs_[run]).streams());
    }
    found.push_back(holders_[holder + kParam].tensor);
  }
  return true;
}

bool Plan::ordered() {
  moved_ |= counters_.moved() || scalars_ != scalars_for_ || used_ != ordered_for_;
  // New gradients, as each backward makes them, in memory of their own: they cannot meet what is
  // written, unless that is somebody else's memory.
  moved_ |= read_moved_ || (own_read_moved_ && (ordered_ || !all_writes_allocated()));
  if (moved_) {
    collect_ranges();
    ordered_ = any_meet(writes_, reads_);
    ordered_for_ = used_;
    scalars_for_ = scalars_;
  }
  moved_ = read_moved_ = own_read_moved_ = false;
  return ordered_;
}

bool Plan::all_writes_allocated() const {
  bool all = true;
  const Holder* holder = holders_.data();
  for (std::size_t i = 0; i < used_; ++i) {
    const Traits traits(runs_[i]);
    for (int s = 0; s < traits.streams(); ++s, ++holder) {
      if (traits.writes(s)) all &= is_allocated(*holder->storage);
    }
  }
  for (const auto& counter : counters_.kept()) all &= is_allocated(*counter.storage);
  return all;
}

bool Plan::meets(std::vector<Range>& others) {
  collect_ranges();
  merge(others);
  return any_meet(others, writes_) || any_meet(others, reads_);
}

void Plan::retain() {
  if (retaining_) return;
  retaining_ = true;
  retain(holders_used_, owners_used_);
  for (const Counters::Counter& counter : counters_.kept()) {
    retain(counter.tensor);
    retain(counter.storage);
  }
}

// Those of the last holders and owners.
void Plan::retain(std::size_t holders, std::size_t owners) {
  for (std::size_t i = holders_used_ - holders; i < holders_used_; ++i) {
    retain(holders_[i].tensor);
    retain(holders_[i].storage);
  }
  for (std::size_t i = owners_used_ - owners; i < owners_used_; ++i) retain(owners_[i]);
}

void Plan::retain(c10::TensorImpl* tensor) {
  tensors_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor));
}

void Plan::retain(c10::StorageImpl* storage) {
  storages_.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
}

bool Plan::is_long() const {
  return bytes_ >= kWorthTheGil &&
         bytes_ >= kWorthHolding * static_cast<std::int64_t>(holders_used_);
}

void Plan::retain_for_kernels() {
  if (!is_long() || !storages_.empty()) return;
  for (std::size_t i = 0; i < holders_used_; ++i) retain(holders_[i].storage);
  for (std::size_t i = 0; i < owners_used_; ++i) retain(owners_[i]);
  for (const Counters::Counter& counter : counters_.kept()) retain(counter.tensor);
}

void Plan::release() {
  retaining_ = false;
  tensors_.clear();
  storages_.clear();
}

void Plan::bump_versions() const {
  constexpr std::size_t kFar = 2 * kAhead;  // tensors, of which a parameter has several
  for (std::size_t i = 0; i < owners_used_; ++i) {
    if (i + 2 * kFar < owners_used_) prefetch<kHeadBytes>(owners_[i + 2 * kFar]);
    if (i + kFar < owners_used_) prefetch(version_of(*owners_[i + kFar]));
    count_write(*owners_[i]);
  }
  counters_.bump_versions();
}

Measured Plan::measure(Order order) {
  end_spans();
  if (is_long()) retain();
  const WithoutGil guard(is_long());
  return fastsgd::measure(spans_, runs_.data(), order);
}

bool Plan::steps() {
  end_spans();
  return std::any_of(spans_.begin(), spans_.end(), [](const Span& span) { return span.is_step(); });
}

bool Plan::any_double() {
  end_spans();
  return std::any_of(spans_.begin(), spans_.end(), [](const Span& span) {
    return has_grads(span.kernel) && span.storage() == static_cast<int>(Storage::kDouble);
  });
}

void Plan::run(const Around& around, bool needs_order) {
  end_spans();
  const bool in_order = needs_order && ordered();
  retain_for_kernels();
  const bool is_long = this->is_long();
  // While the GIL is given up, another thread may keep a tensor for its backward: it is to find
  // that it was written since.
  if (!is_long) bump_versions();
  counters_.advance();
  {
    const WithoutGil guard(is_long);
    execute(spans_, runs_.data(), rows_.data(), around, bytes_, in_order);
  }
  if (is_long) bump_versions();
  release();
}

}  // namespace fastsgd
