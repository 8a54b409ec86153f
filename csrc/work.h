// What a plan hands to an engine.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "layout.h"

namespace fastsgd {

// Neighbouring runs that one kernel takes with one row of scalars. Where there is a layout there is
// one run, and its streams do not lie flat but as the layout says.
struct Span {
  int kernel;  // its number, or kZero
  const Layout* layout;
  std::int32_t row;
  std::int16_t item_size;
  std::int16_t streams;
  std::int64_t first, end;  // the runs

  std::int64_t item_bytes() const { return item_size * streams; }  // moved for one element
};

}  // namespace fastsgd
