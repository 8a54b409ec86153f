// What the share of one of several workers is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "work.h"

namespace fastsgd {

// The share of one worker. Of all bytes, in the order of the runs and by item_bytes(span), it is
// those in [begin, end), cut at multiples of `grain` elements: visit(span, run, first, last) is
// called with elements of each run.
template <class ItemBytes, class Visit>
void visit_share(const std::vector<Span>& spans, const Run* runs, std::int64_t begin,
                 std::int64_t end, std::int64_t grain, ItemBytes item_bytes, Visit visit) {
  std::int64_t passed = 0;
  for (const Span& span : spans) {
    const std::int64_t item = item_bytes(span);
    if (item == 0) continue;
    const auto cut = [&](const Run& run, std::int64_t bytes) {
      const std::int64_t elements = bytes / item;
      return std::clamp<std::int64_t>((elements + grain - 1) / grain * grain, 0, run.count);
    };
    for (std::int64_t r = span.first; r < span.end && passed < end; ++r) {
      const Run& run = runs[r];
      const std::int64_t bytes = run.count * item;
      const std::int64_t first = cut(run, begin - passed);
      const std::int64_t last = passed + bytes <= end ? run.count : cut(run, end - passed);
      if (first < last) visit(span, run, first, last);
      passed += bytes;
    }
  }
}

}  // namespace fastsgd
