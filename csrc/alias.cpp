#include "alias.h"

#include <algorithm>

namespace fastsgd {

namespace {

void sort(std::vector<Range>& ranges) {
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
}

}  // namespace

bool any_meet(std::vector<Range>& writes, const std::vector<Range>& reads) {
  sort(writes);
  for (std::size_t i = 1; i < writes.size(); ++i) {
    if (writes[i - 1].end > writes[i].begin) return true;
  }
  // Sorted ranges that do not meet have sorted ends too.
  return std::any_of(reads.begin(), reads.end(), [&](const Range& read) {
    const auto first = std::partition_point(writes.begin(), writes.end(),
                                            [&](const Range& w) { return w.end <= read.begin; });
    return first != writes.end() && first->begin < read.end;
  });
}

std::vector<std::int64_t> find_meeting(std::vector<Use>& uses) {
  std::sort(uses.begin(), uses.end(),
            [](const Use& a, const Use& b) { return a.range.begin < b.range.begin; });
  std::vector<std::int64_t> meeting;
  std::uintptr_t met = 0, met_and_written = 0;  // so far those reach that have met another
  std::vector<const Use*> alone;                // those that have not, and reach to here
  const auto meets = [&](const Use& use) {
    meeting.push_back(use.by);
    met = std::max(met, use.range.end);
    if (use.writes) met_and_written = std::max(met_and_written, use.range.end);
  };
  for (const Use& use : uses) {
    bool any = (use.writes ? met : met_and_written) > use.range.begin;
    std::erase_if(alone, [&](const Use* other) {
      if (other->range.end <= use.range.begin) return true;
      if (other->by == use.by || !(other->writes || use.writes)) return false;
      meets(*other);
      return any = true;
    });
    any ? meets(use) : alone.push_back(&use);
  }
  std::sort(meeting.begin(), meeting.end());
  meeting.erase(std::unique(meeting.begin(), meeting.end()), meeting.end());
  return meeting;
}

void merge(std::vector<Range>& ranges) {
  sort(ranges);
  std::size_t kept = 0;
  for (std::size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[kept].end) {
      ranges[kept].end = std::max(ranges[kept].end, ranges[i].end);
    } else {
      ranges[++kept] = ranges[i];
    }
  }
  if (!ranges.empty()) ranges.resize(kept + 1);
}

}  // namespace fastsgd
