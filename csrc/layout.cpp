#include "layout.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace fastsgd {

// A stream that is laid out as most are. One that is written counts twice, as it is read too; but
// for the gradient, all usually are.
int Layout::most_usual(int streams) const {
  int best = kParam, most = 0;
  for (int s = 0; s < streams; ++s) {
    int alike = 0;
    for (int t = 0; t < streams; ++t) {
      bool same = true;
      for (int d = 0; d < dims; ++d) same &= stride[d][s] == stride[d][t];
      if (same) alike += t == kGrad ? 1 : 2;
    }
    if (alike <= most) continue;
    most = alike;
    best = s;
  }
  return best;
}

void Layout::simplify(int streams) {
  int kept = 0;
  for (int d = 0; d < dims; ++d) {
    if (size[d] == 1) continue;
    size[kept] = size[d];
    std::copy_n(stride[d], streams, stride[kept]);
    ++kept;
  }
  dims = kept;
  const int by = most_usual(streams);
  // Insertion sort: there are few dimensions, nearly always in order, and equal ones must stay so.
  for (int d = 1; d < dims; ++d) {
    for (int e = d; e > 0 && stride[e - 1][by] < stride[e][by]; --e) {
      std::swap(size[e - 1], size[e]);
      std::swap_ranges(stride[e - 1], stride[e - 1] + streams, stride[e]);
    }
  }
  int last = 0;
  for (int d = 1; d < dims; ++d) {
    bool joins = true;
    for (int s = 0; s < streams; ++s) joins &= stride[last][s] == stride[d][s] * size[d];
    if (joins) {
      size[last] *= size[d];
    } else {
      size[++last] = size[d];
    }
    std::copy_n(stride[d], streams, stride[last]);
  }
  dims = dims == 0 ? 0 : last + 1;
}

bool Layout::flat(int stream) const {
  std::int64_t next = 1;
  for (int d = dims - 1; d >= 0; --d) {
    if (stride[d][stream] != next) return false;
    next *= size[d];
  }
  return true;
}

bool Layout::injective(int stream) const {
  int order[kMaxDims];
  std::iota(order, order + dims, 0);
  std::sort(order, order + dims,
            [&](int a, int b) { return stride[a][stream] < stride[b][stream]; });
  std::int64_t reach = 0;  // the last element that the dimensions so far can reach
  for (int i = 0; i < dims; ++i) {
    const std::int64_t step = stride[order[i]][stream];
    if (size[order[i]] > 1 && step <= reach) return false;
    reach += (size[order[i]] - 1) * step;
  }
  return true;
}

std::int64_t Layout::extent(int stream) const {
  std::int64_t last = 0;
  for (int d = 0; d < dims; ++d) last += (size[d] - 1) * stride[d][stream];
  return last + 1;
}

}  // namespace fastsgd
