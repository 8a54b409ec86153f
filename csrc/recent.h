// What a step has made for a group of parameters is good for later groups that ask for the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace fastsgd {

// The last of `made` that matches, if it is one of the last few; else null. The bound is on the
// time that this takes where no two groups are alike.
template <class T, class Matches>
const T* find_recent(const std::vector<T>& made, Matches matches) {
  constexpr std::size_t kLooks = 8;
  const auto end = made.rbegin() + static_cast<std::ptrdiff_t>(std::min(made.size(), kLooks));
  const auto found = std::find_if(made.rbegin(), end, matches);
  return found == end ? nullptr : &*found;
}

}  // namespace fastsgd
