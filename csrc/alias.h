// Finds memory that one piece of work writes and another uses. Then the pieces must run in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastsgd {

// A stretch of memory that holds everything a stream reaches: [begin, end).
struct Range {
  std::uintptr_t begin, end;
  bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};

// Is told every stream's range at every step, in the same order. While none has moved, the answer of
// the last step holds, and finding that out costs a comparison a stream.
class AliasFinder {
 public:
  void begin();
  void writes(Range range) { note(writes_, writes_used_, range, writes_moved_); }
  void reads(Range range) { note(reads_, reads_used_, range, reads_moved_); }
  // Whether any written range meets another range. Ranges of one piece of work must not meet.
  bool found();

 private:
  static void note(std::vector<Range>& ranges, std::size_t& used, Range range, bool& moved);
  bool meets_a_write(const Range& range) const;

  std::vector<Range> writes_, reads_, sorted_;
  std::size_t writes_used_ = 0, reads_used_ = 0;
  bool writes_moved_ = true, reads_moved_ = true;
  bool writes_meet_ = false, answer_ = false;
};

}  // namespace fastsgd
