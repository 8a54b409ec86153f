#include "alias.h"

#include <algorithm>

namespace fastsgd {

bool any_meet(std::vector<Range>& writes, const std::vector<Range>& reads) {
  std::sort(writes.begin(), writes.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
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

}  // namespace fastsgd
