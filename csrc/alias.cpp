#include "alias.h"

#include <algorithm>

namespace fastsgd {

void AliasFinder::begin() {
  writes_used_ = reads_used_ = 0;
  writes_moved_ = reads_moved_ = false;
}

void AliasFinder::note(std::vector<Range>& ranges, std::size_t& used, Range range, bool& moved) {
  if (used == ranges.size()) {
    ranges.push_back(range);
    moved = true;
  } else if (ranges[used].begin != range.begin || ranges[used].end != range.end) {
    ranges[used] = range;
    moved = true;
  }
  ++used;
}

bool AliasFinder::meets_a_write(const Range& range) const {
  // Sorted ranges that do not meet have sorted ends too.
  const auto first = std::partition_point(sorted_.begin(), sorted_.end(),
                                          [&](const Range& w) { return w.end <= range.begin; });
  return first != sorted_.end() && first->begin < range.end;
}

bool AliasFinder::found() {
  writes_moved_ |= writes_used_ != writes_.size();
  reads_moved_ |= reads_used_ != reads_.size();
  writes_.resize(writes_used_);
  reads_.resize(reads_used_);
  if (writes_moved_) {
    const auto before = [](const Range& a, const Range& b) { return a.begin < b.begin; };
    const auto meet = [](const Range& a, const Range& b) { return a.end > b.begin; };
    sorted_.assign(writes_.begin(), writes_.end());
    std::sort(sorted_.begin(), sorted_.end(), before);
    writes_meet_ = std::adjacent_find(sorted_.begin(), sorted_.end(), meet) != sorted_.end();
  }
  if (writes_moved_ || reads_moved_) {
    answer_ = writes_meet_ || std::any_of(reads_.begin(), reads_.end(),
                                          [&](const Range& r) { return meets_a_write(r); });
  }
  return answer_;
}

}  // namespace fastsgd
