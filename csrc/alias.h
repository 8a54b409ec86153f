// Finds memory that one piece of work writes and another uses. Then the pieces must run in order.
#pragma once

#include <cstdint>
#include <vector>

namespace fastsgd {

// A stretch of memory that holds everything a stream reaches: [begin, end).
struct Range {
  std::uintptr_t begin, end;

  friend bool operator==(const Range&, const Range&) = default;
};

// Whether any of `writes` meets another of them or any of `reads`. Sorts `writes`.
bool any_meet(std::vector<Range>& writes, const std::vector<Range>& reads);

// Memory that a piece of work uses.
struct Use {
  Range range;
  std::int64_t by;  // the number of the piece
  bool writes;
};

// The numbers of the pieces of work that write what another uses, or use what another writes;
// ascending, each once. What one piece uses is not compared with itself. Sorts `uses`.
std::vector<std::int64_t> find_meeting(std::vector<Use>& uses);

// Makes ranges that meet one range.
void merge(std::vector<Range>& ranges);

}  // namespace fastsgd
