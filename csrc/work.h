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
  std::int8_t streams;
  std::int8_t wide;         // the stream that is float32 whatever the others are, or -1
  std::int64_t first, end;  // the runs

  std::int64_t size_of(int stream) const { return stream == wide ? 4 : item_size; }
  std::int64_t item_bytes() const {  // moved for one element
    return item_size * streams + (wide < 0 ? 0 : 4 - item_size);
  }
  bool is_step() const { return fastsgd::is_step(kernel); }
  int storage() const { return kernel % kStorages; }
};

}  // namespace fastsgd
