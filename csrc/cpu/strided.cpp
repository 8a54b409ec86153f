#include "cpu/strided.h"

#include <algorithm>
#include <cstring>

#include "prefetch.h"

namespace fastsgd {
namespace {

constexpr int kTile = 512;  // elements
// Tiles are on the stack, which threads of somebody's own may have little of.
constexpr std::int64_t kTileBytes = kMaxStreams * kTile * sizeof(double);
constexpr std::int64_t kLongRow = 16;  // elements; shorter ones are gathered, as a run has its cost
constexpr int kRows = 32;              // handed to a kernel at once
// A tile of some rows by many columns, for streams that lie across: a column is as long as a cache
// line of float32, and is fetched so many ahead, as they lie too far apart for hardware to see.
constexpr int kBlockRows = 16, kBlockColumns = 128, kColumnsAhead = 12;
// Fewer would share too little of a line, and shorter ones go into tiles whole.
constexpr std::int64_t kManyRows = 8, kLongBlock = 32;
static_assert(kTileBytes / (kMaxStreams * kBlockRows * sizeof(double)) >= kLongBlock);

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
  // Moves on by so much in dimension `d`, no farther than to its end. Returns how far `stream`
  // moves.
  std::int64_t advance(const Layout& layout, int stream, int d, std::int64_t by) {
    std::int64_t moved = by * layout.stride[d][stream];
    index[d] += by;
    for (; d > 0 && index[d] == layout.size[d]; --d) {
      moved += layout.stride[d - 1][stream] - layout.size[d] * layout.stride[d][stream];
      index[d] = 0;
      ++index[d - 1];
    }
    return moved;
  }
};

enum class Way { kToTile, kFromTile };

// A row between memory and a tile, in which its elements lie `apart`. They may lie at any address.
template <Way kWay, class T>
void copy_row(char* memory, std::int64_t stride, char* tile, std::int64_t apart,
              std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < count; ++i) {
    char *at = memory + i * stride * kSize, *in_tile = tile + i * apart * kSize;
    if constexpr (kWay == Way::kToTile) {
      std::memcpy(in_tile, at, sizeof(T));
    } else {
      std::memcpy(at, in_tile, sizeof(T));
    }
  }
}

// Rows that lie `pitch` apart, of `count` elements. They are copied by columns where those lie
// closer together, or are longer, as a loop has its cost too.
template <Way kWay, class T>
void copy_block(char* memory, std::int64_t stride, std::int64_t pitch, char* tile,
                std::int64_t rows, std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  if (rows > count || (pitch < stride && rows > 1)) {
    for (std::int64_t i = 0; i < count; ++i) {
      if (kWay == Way::kToTile && i + kColumnsAhead < count) {
        const char* ahead = memory + (i + kColumnsAhead) * stride * kSize;
        prefetch(ahead);
        prefetch(ahead + (rows - 1) * pitch * kSize);  // which may be in the next line
      }
      char *column = memory + i * stride * kSize, *in_tile = tile + i * kSize;
      if (pitch == 1 && rows == kBlockRows && count == kBlockColumns) {  // usually: unrolled
        copy_row<kWay, T>(column, 1, in_tile, kBlockColumns, kBlockRows);
      } else {
        copy_row<kWay, T>(column, pitch, in_tile, count, rows);
      }
    }
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    char *row = memory + r * pitch * kSize, *in_tile = tile + r * count * kSize;
    if (stride == 1) {
      copy_row<kWay, T>(row, 1, in_tile, 1, count);
    } else if (stride == 0) {
      copy_row<kWay, T>(row, 0, in_tile, 1, count);
    } else {
      copy_row<kWay, T>(row, stride, in_tile, 1, count);
    }
  }
}

// `count` elements from a position on, between one stream's memory and a tile.
template <Way kWay, class T>
void copy_rows(const Layout& layout, int stream, Position position, char* memory, char* tile,
               std::int64_t count) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  const int inner = layout.dims - 1, outer = std::max(inner - 1, 0);
  const std::int64_t length = layout.size[inner];
  memory += position.offset(layout, stream) * kSize;
  while (count > 0) {
    // Whole rows at once, as many as follow; or a part of one.
    const bool whole = inner > 0 && position.index[inner] == 0 && count >= length;
    const std::int64_t row = whole ? length : std::min(count, position.left_in_row(layout));
    const std::int64_t rows =
        whole ? std::min(count / length, layout.size[outer] - position.index[outer]) : 1;
    copy_block<kWay, T>(memory, layout.stride[inner][stream], layout.stride[outer][stream], tile,
                        rows, row);
    memory += position.advance(layout, stream, whole ? outer : inner, whole ? rows : row) * kSize;
    tile += rows * row * kSize;
    count -= rows * row;
  }
}

// Calls copy.operator()<T>() with the type that elements of a size are copied as.
template <class Copy>
void by_size(std::int64_t item_size, Copy copy) {
  switch (item_size) {
    case 2:
      return copy.template operator()<std::uint16_t>();
    case 4:
      return copy.template operator()<std::uint32_t>();
    default:
      return copy.template operator()<std::uint64_t>();
  }
}

// What is to be done with one run.
struct Visit {
  Kernel kernel;
  const Span& span;
  const Run& run;
  const Row& row;
  const Around& around;

  const Layout& layout() const { return *span.layout; }
  int inner() const { return layout().dims - 1; }
  // Whether what the kernel makes of a stream is kept.
  bool writes(int stream) const {
    if (stream != kGrad) return true;
    return is_exchange(span.kernel) || (is_step(span.kernel) && around.writes_grad());
  }

  bool in_rows() const;
  bool in_blocks() const;
  void rows(std::int64_t begin, std::int64_t end) const;
  void tiles(std::int64_t begin, std::int64_t end) const;
  void blocks(std::int64_t begin, std::int64_t end) const;
  void block(const Position& position, std::int64_t rows) const;
};

// Whether long rows lie flat in every stream.
bool Visit::in_rows() const {
  bool flat = layout().size[inner()] >= kLongRow;
  for (int s = 0; s < span.streams; ++s) flat &= layout().stride[inner()][s] == 1;
  return flat;
}

// Each of them is a run.
void Visit::rows(std::int64_t begin, std::int64_t end) const {
  Position position(layout(), begin);
  Run rows[kRows];
  while (begin < end) {
    int filled = 0;
    for (; filled < kRows && begin < end; ++filled) {
      Run& next = rows[filled];
      next.count = std::min(end - begin, position.left_in_row(layout()));
      for (int s = 0; s < span.streams; ++s) {
        next.stream[s] = run.stream[s] + position.offset(layout(), s) * span.size_of(s);
      }
      position.advance(layout(), kParam, inner(), next.count);
      begin += next.count;
    }
    kernel(row, around, rows, filled);
  }
}

// Anything else, a tile at a time: streams that do not lie flat pass through tiles on the stack.
void Visit::tiles(std::int64_t begin, std::int64_t end) const {
  alignas(64) char tiles[kTileBytes];
  const auto tile = [&](int s) { return tiles + kTileBytes / kMaxStreams * s; };
  bool flat[kMaxStreams], passes[kMaxStreams];
  const auto copy = [&]<Way kWay>(int s, const Position& position, std::int64_t count) {
    by_size(span.size_of(s), [&]<class T>() {
      copy_rows<kWay, T>(layout(), s, position, run.stream[s], tile(s), count);
    });
  };
  for (int s = 0; s < span.streams; ++s) {
    flat[s] = layout().flat(s);
    passes[s] = !flat[s];
    if (layout().extent(s) > 1) continue;  // else all elements are one, which is only read
    const std::int64_t count = std::min(end - begin, std::int64_t{kTile});
    copy.template operator()<Way::kToTile>(s, Position(layout(), begin), count);
    passes[s] = false;
  }
  for (std::int64_t count; begin < end; begin += count) {
    count = std::min(end - begin, std::int64_t{kTile});
    const Position position(layout(), begin);
    Run part;
    part.count = count;
    for (int s = 0; s < span.streams; ++s) {
      part.stream[s] = flat[s] ? run.stream[s] + begin * span.size_of(s) : tile(s);
      if (passes[s]) copy.template operator()<Way::kToTile>(s, position, count);
    }
    kernel(row, around, &part, 1);
    for (int s = 0; s < span.streams; ++s) {
      if (passes[s] && writes(s)) copy.template operator()<Way::kFromTile>(s, position, count);
    }
  }
}

// Whether many long rows lie across in a stream, as where one tensor is another's transpose: its
// elements then share cache lines with those of the next rows.
bool Visit::in_blocks() const {
  if (inner() < 1 || layout().size[inner()] < kLongBlock) return false;
  if (layout().size[inner() - 1] < kManyRows) return false;
  bool across = false;
  for (int s = 0; s < span.streams; ++s) {
    const std::int64_t pitch = layout().stride[inner() - 1][s];
    across |= 0 < pitch && pitch < layout().stride[inner()][s];
  }
  return across;
}

// Some whole rows, by a block of their columns at a time. What does not lie flat in a row passes
// through a tile.
void Visit::block(const Position& position, std::int64_t rows) const {
  alignas(64) char tiles[kTileBytes];
  const std::int64_t length = layout().size[inner()];
  const auto &stride = layout().stride[inner()], &pitch = layout().stride[inner() - 1];
  char *memory[kMaxStreams], *tile[kMaxStreams];
  std::int64_t bytes[kMaxStreams + 1] = {0};  // of a column in the tiles before
  for (int s = 0; s < span.streams; ++s) {
    memory[s] = run.stream[s] + position.offset(layout(), s) * span.size_of(s);
    bytes[s + 1] = bytes[s] + (stride[s] == 1 ? 0 : kBlockRows * span.size_of(s));
  }
  const std::int64_t most = std::min<std::int64_t>(kTileBytes / bytes[span.streams], kBlockColumns);
  for (int s = 0; s < span.streams; ++s) tile[s] = tiles + most * bytes[s];
  Run part[kBlockRows];
  for (std::int64_t first = 0, count; first < length; first += count) {
    count = std::min(length - first, most);
    const auto copy = [&]<Way kWay>(int s) {
      by_size(span.size_of(s), [&]<class T>() {
        copy_block<kWay, T>(memory[s], stride[s], pitch[s], tile[s], rows, count);
      });
    };
    for (int s = 0; s < span.streams; ++s) {
      const bool flat = stride[s] == 1;
      if (!flat) copy.template operator()<Way::kToTile>(s);
      char* elements = flat ? memory[s] : tile[s];
      for (std::int64_t r = 0; r < rows; ++r) {
        part[r].stream[s] = elements + r * (flat ? pitch[s] : count) * span.size_of(s);
        part[r].count = count;
      }
    }
    kernel(row, around, part, rows);
    for (int s = 0; s < span.streams; ++s) {
      if (stride[s] != 1 && writes(s)) copy.template operator()<Way::kFromTile>(s);
      memory[s] += count * stride[s] * span.size_of(s);
    }
  }
}

void Visit::blocks(std::int64_t begin, std::int64_t end) const {
  const std::int64_t length = layout().size[inner()];
  while (begin < end) {
    const Position position(layout(), begin);
    const std::int64_t at = position.index[inner() - 1];
    const std::int64_t together =
        std::min(layout().size[inner() - 1] - at, kBlockRows - at % kBlockRows);
    const std::int64_t rows = std::min((end - begin) / length, together);
    if (position.index[inner()] == 0 && rows > 0) {
      block(position, rows);
      begin += rows * length;
    } else {  // a part of one
      const std::int64_t count = std::min(end - begin, position.left_in_row(layout()));
      tiles(begin, begin + count);
      begin += count;
    }
  }
}

}  // namespace

void gather(const Span& span, const Run& run, int stream, std::int64_t begin, std::int64_t count,
            char* tile) {
  by_size(span.size_of(stream), [&]<class T>() {
    copy_rows<Way::kToTile, T>(*span.layout, stream, Position(*span.layout, begin),
                               run.stream[stream], tile, count);
  });
}

void execute_strided(Kernel kernel, const Span& span, const Run& run, const Row& row,
                     const Around& around, std::int64_t begin, std::int64_t end) {
  const Visit visit{kernel, span, run, row, around};
  if (visit.in_rows()) return visit.rows(begin, end);
  if (visit.in_blocks()) return visit.blocks(begin, end);
  visit.tiles(begin, end);
}

}  // namespace fastsgd
