#include "cpu/strided.h"

#include <algorithm>
#include <cstring>

namespace fastsgd {
namespace {

constexpr int kTile = 512;             // elements
constexpr std::int64_t kLongRow = 16;  // elements; shorter ones are gathered, as a run has its cost
constexpr int kRows = 32;              // handed to a kernel at once

// An element's place in a layout.
struct Position {
  std::int64_t index[kMaxDims];

  Position(const Layout& layout, std::int64_t element) {
    for (int d = layout.dims - 1; d >= 0; --d) {
      index[d] = element % layout.size[d];
      element /= layout.size[d];
    }
  }
  std::int64_t offset(const Layout& layout, int stream) const {
    std::int64_t offset = 0;
    for (int d = 0; d < layout.dims; ++d) offset += index[d] * layout.stride[d][stream];
    return offset;
  }
  std::int64_t left_in_row(const Layout& layout) const {
    return layout.size[layout.dims - 1] - index[layout.dims - 1];
  }
  // Moves on by `elements`, no farther than to the next row. Returns how far `stream` moves.
  std::int64_t advance(const Layout& layout, int stream, std::int64_t elements) {
    int d = layout.dims - 1;
    std::int64_t moved = elements * layout.stride[d][stream];
    index[d] += elements;
    for (; d > 0 && index[d] == layout.size[d]; --d) {
      moved += layout.stride[d - 1][stream] - layout.size[d] * layout.stride[d][stream];
      index[d] = 0;
      ++index[d - 1];
    }
    return moved;
  }
};

enum class Way { kToTile, kFromTile };

// A row between memory and a tile. Elements may lie at any address.
template <Way kWay, class T>
void copy_row(char* memory, std::int64_t stride, char* tile, std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < count; ++i) {
    char* at = memory + i * stride * kSize;
    if constexpr (kWay == Way::kToTile) {
      std::memcpy(tile + i * kSize, at, sizeof(T));
    } else {
      std::memcpy(at, tile + i * kSize, sizeof(T));
    }
  }
}

// `count` elements from a position on, between one stream's memory and a tile.
template <Way kWay, class T>
void copy_rows(const Layout& layout, int stream, Position position, char* memory, char* tile,
               std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  const std::int64_t stride = layout.stride[layout.dims - 1][stream];
  memory += position.offset(layout, stream) * kSize;
  while (count > 0) {
    const std::int64_t row = std::min(count, position.left_in_row(layout));
    if (stride == 1) {
      copy_row<kWay, T>(memory, 1, tile, row);
    } else if (stride == 0) {
      copy_row<kWay, T>(memory, 0, tile, row);
    } else {
      copy_row<kWay, T>(memory, stride, tile, row);
    }
    memory += position.advance(layout, stream, row) * kSize;
    tile += row * kSize;
    count -= row;
  }
}

template <Way kWay>
void copy_rows(const Layout& layout, int stream, const Position& position, char* memory, char* tile,
               std::int64_t count, std::int64_t item_size) {
  switch (item_size) {
    case 2:
      return copy_rows<kWay, std::uint16_t>(layout, stream, position, memory, tile, count);
    case 4:
      return copy_rows<kWay, std::uint32_t>(layout, stream, position, memory, tile, count);
    default:
      return copy_rows<kWay, std::uint64_t>(layout, stream, position, memory, tile, count);
  }
}

// Long rows that lie flat in every stream, each of them a run.
void execute_rows(Kernel kernel, const Span& span, const Run& run, const Row& row,
                  const Around& around, std::int64_t begin, std::int64_t end) {
  const Layout& layout = *span.layout;
  Position position(layout, begin);
  Run rows[kRows];
  while (begin < end) {
    int filled = 0;
    for (; filled < kRows && begin < end; ++filled) {
      Run& next = rows[filled];
      next.count = std::min(end - begin, position.left_in_row(layout));
      for (int s = 0; s < span.streams; ++s) {
        next.stream[s] = run.stream[s] + position.offset(layout, s) * span.size_of(s);
      }
      position.advance(layout, kParam, next.count);
      begin += next.count;
    }
    kernel(row, around, rows, filled);
  }
}

// Anything else, a tile at a time: streams that do not lie flat pass through tiles on the stack.
void execute_tiles(Kernel kernel, const Span& span, const Run& run, const Row& row,
                   const Around& around, std::int64_t begin, std::int64_t end) {
  const Layout& layout = *span.layout;
  alignas(64) char tile[kMaxStreams][kTile * sizeof(double)];
  bool flat[kMaxStreams];
  for (int s = 0; s < span.streams; ++s) flat[s] = layout.flat(s);
  const bool writes_second =
      is_exchange(span.kernel) || (is_step(span.kernel) && around.writes_grad());
  for (std::int64_t count; begin < end; begin += count) {
    count = std::min(end - begin, std::int64_t{kTile});
    const Position position(layout, begin);
    Run part;
    part.count = count;
    for (int s = 0; s < span.streams; ++s) {
      part.stream[s] = flat[s] ? run.stream[s] + begin * span.size_of(s) : tile[s];
      if (flat[s]) continue;
      copy_rows<Way::kToTile>(layout, s, position, run.stream[s], tile[s], count, span.size_of(s));
    }
    kernel(row, around, &part, 1);
    for (int s = 0; s < span.streams; ++s) {
      if (flat[s] || (s == kGrad && !writes_second)) continue;
      copy_rows<Way::kFromTile>(layout, s, position, run.stream[s], tile[s], count,
                                span.size_of(s));
    }
  }
}

}  // namespace

void gather(const Span& span, const Run& run, int stream, std::int64_t begin, std::int64_t count,
            char* tile) {
  copy_rows<Way::kToTile>(*span.layout, stream, Position(*span.layout, begin), run.stream[stream],
                          tile, count, static_cast<int>(span.size_of(stream)));
}

void execute_strided(Kernel kernel, const Span& span, const Run& run, const Row& row,
                     const Around& around, std::int64_t begin, std::int64_t end) {
  const Layout& layout = *span.layout;
  const int inner = layout.dims - 1;
  bool in_rows = layout.size[inner] >= kLongRow;
  for (int s = 0; s < span.streams; ++s) in_rows &= layout.stride[inner][s] == 1;
  (in_rows ? execute_rows : execute_tiles)(kernel, span, run, row, around, begin, end);
}

}  // namespace fastsgd
