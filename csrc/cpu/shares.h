// What the share of one of several workers is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "work.h"

namespace fastsgd {

// One worker of several that share so many bytes.
struct Share {
  int number, team;
  std::int64_t bytes;

  std::int64_t begin() const { return bytes * number / team; }
  // The last one's is whatever is left.
  std::int64_t end() const {
    return number + 1 < team ? bytes * (number + 1) / team
                             : std::numeric_limits<std::int64_t>::max();
  }
};

// Visits a share. Of all bytes, in the order of the runs and by item_bytes(span), it is those from
// its begin to its end, cut at multiples of `grain` elements: whole(span, first, runs) is called
// with runs that are all in it, part(span, run, first, last) with elements of one that is not.
template <class ItemBytes, class Whole, class Part>
void visit_share(const std::vector<Span>& spans, const Run* runs, Share share, std::int64_t grain,
                 ItemBytes item_bytes, Whole whole, Part part) {
  const std::int64_t begin = share.begin(), end = share.end();
  std::int64_t passed = 0;
  for (const Span& span : spans) {
    const std::int64_t item = item_bytes(span);
    if (item == 0) continue;
    const auto cut = [&](const Run& run, std::int64_t bytes) {
      const std::int64_t elements = bytes / item;
      return std::clamp<std::int64_t>((elements + grain - 1) / grain * grain, 0, run.count);
    };
    for (std::int64_t r = span.first; r < span.end && passed < end;) {
      const std::int64_t first = r;
      for (; passed >= begin && r < span.end && passed + runs[r].count * item <= end; ++r) {
        passed += runs[r].count * item;
      }
      if (first < r) {
        whole(span, runs + first, r - first);
        continue;
      }
      const Run& run = runs[r++];
      const std::int64_t from = cut(run, begin - passed), bytes = run.count * item;
      const std::int64_t to = passed + bytes <= end ? run.count : cut(run, end - passed);
      if (from < to) part(span, run, from, to);
      passed += bytes;
    }
  }
}

}  // namespace fastsgd
