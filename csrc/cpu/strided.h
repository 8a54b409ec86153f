// Visits streams that do not lie flat in memory, or not all in the same order.
#pragma once

#include "cpu/engine.h"

namespace fastsgd {

// Elements [begin, end), in the order of the span's layout, of its one run.
void execute_strided(Kernel kernel, const Span& span, const Run& run, const Row& row,
                     const Around& around, std::int64_t begin, std::int64_t end);

// Copies `count` elements of one stream, from element `begin` on, to a tile.
void gather(const Span& span, const Run& run, int stream, std::int64_t begin, std::int64_t count,
            char* tile);

}  // namespace fastsgd
