// What becomes of a plan: what memory its updates use and which of them meet, what is kept alive
// meanwhile, and the work itself.
#include <algorithm>

#include "gil.h"
#include "plan.h"
#include "version.h"

namespace fastsgd {
namespace {

constexpr std::int64_t kWorthTheGil = 8 << 20;  // bytes: about a millisecond
// Bytes of one tensor: what work over fewer takes is less than the walk took, which has to have the
// GIL, and not much more than counting a holder in and out.
constexpr std::int64_t kWorthHolding = 4 << 10;

}  // namespace

void Plan::end_spans() {
  auto end = static_cast<std::int64_t>(used_);
  for (auto span = spans_.rbegin(); span != spans_.rend(); ++span) {
    span->end = end;
    end = span->first;
  }
}

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
