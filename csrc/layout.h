// How to visit, in one order, streams of one shape that are laid out differently in memory.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace fastsgd {

inline constexpr int kMaxDims = 16;

// Dimensions from the outermost to the innermost in the memory of one stream, which most lie like;
// those of size 1 are left out, and neighbours joined where every stream allows it. Strides are in
// elements.
struct Layout {
  int dims = 0;
  std::int64_t size[kMaxDims];
  std::int64_t stride[kMaxDims][kMaxStreams];

  // Orders by the memory of most streams, and joins, `dims` dimensions as they stand.
  void simplify(int streams);
  // Whether the order of the layout is that of the stream's memory, without gaps.
  bool flat(int stream) const;
  // Whether no two indices can reach the same element of `stream`. Exact for whatever slicing,
  // transposing and expanding make; false when in doubt.
  bool injective(int stream) const;
  // How many elements lie between the first and the last that `stream` reaches, both counted.
  std::int64_t extent(int stream) const;

 private:
  int most_usual(int streams) const;
};

}  // namespace fastsgd
