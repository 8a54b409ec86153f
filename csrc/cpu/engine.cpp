#include "cpu/engine.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cpu/kernels.h"

namespace fastsgd {
namespace {

// --- how many threads ---------------------------------------------------------------------------

// The threads of a parallel region do not exist in a forked child, and waiting for them would hang.
std::atomic<bool> forked{false};

int available_cpus() {
  static const int cpus = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  }();
  return cpus;
}

// A team larger than the machine pays context switches at its barrier, so it must have more to do.
std::int64_t worth_a_region(int team) {
  return team <= available_cpus() ? kLongWork : 16 * kLongWork;
}

// --- streams that do not lie flat ---------------------------------------------------------------

constexpr int kTile = 512;

template <class T>
void copy_strided(char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
                  std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * to_stride * sizeof(T), from + i * from_stride * sizeof(T), sizeof(T));
  }
}

void copy_strided(char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
                  std::int64_t count, int item_size) {
  switch (item_size) {
    case 2: return copy_strided<std::uint16_t>(to, to_stride, from, from_stride, count);
    case 4: return copy_strided<std::uint32_t>(to, to_stride, from, from_stride, count);
    default: return copy_strided<std::uint64_t>(to, to_stride, from, from_stride, count);
  }
}

// Elements [begin, end) in the layout's order, a stretch of the innermost dimension at a time. A
// stream that is not contiguous there passes through a tile on the stack.
void run_strided(const Work& work, const Row& row, std::int64_t begin, std::int64_t end) {
  const Layout& layout = *work.layout;
  const int inner = layout.dims - 1;
  alignas(64) char tile[kMaxStreams][kTile * sizeof(double)];
  std::int64_t index[kMaxDims];
  std::int64_t rest = begin;
  for (int d = inner; d >= 0; --d) {
    index[d] = rest % layout.size[d];
    rest /= layout.size[d];
  }
  while (begin < end) {
    const std::int64_t count =
        std::min({end - begin, layout.size[inner] - index[inner], std::int64_t{kTile}});
    char *at[kMaxStreams], *direct[kMaxStreams];
    for (int s = 0; s < work.streams; ++s) {
      std::int64_t offset = 0;
      for (int d = 0; d <= inner; ++d) offset += index[d] * layout.stride[d][s];
      at[s] = direct[s] = work.stream[s] + offset * work.item_size;
      const std::int64_t stride = layout.stride[inner][s];
      if (stride == 1) continue;
      direct[s] = tile[s];
      copy_strided(tile[s], 1, at[s], stride, count, work.item_size);
    }
    work.kernel(row, direct, count);
    for (int s = 0; s < work.streams; ++s) {
      const bool written = s != kGrad || row.unscale;
      if (!written || direct[s] == at[s]) continue;
      copy_strided(at[s], layout.stride[inner][s], tile[s], 1, count, work.item_size);
    }
    begin += count;
    index[inner] += count;
    for (int d = inner; d > 0 && index[d] == layout.size[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

void run_range(const Work& work, const Row& row, std::int64_t begin, std::int64_t end) {
  if (work.layout != nullptr) return run_strided(work, row, begin, end);
  char* streams[kMaxStreams];
  for (int s = 0; s < work.streams; ++s) streams[s] = work.stream[s] + begin * work.item_size;
  work.kernel(row, streams, end - begin);
}

// The share of one worker: of all bytes in the list's order, those in [begin, end).
void run_share(const Work* work, std::size_t count, const Row* rows, std::int64_t begin,
               std::int64_t end) {
  // Cuts fall on multiples of 64 elements, so that two workers do not write one cache line.
  const auto element = [](const Work& w, std::int64_t bytes) {
    const std::int64_t elements = bytes / (w.item_size * w.streams);
    return std::clamp<std::int64_t>((elements + 63) / 64 * 64, 0, w.count);
  };
  std::int64_t passed = 0;
  for (std::size_t i = 0; i < count && passed < end; ++i) {
    const Work& w = work[i];
    const std::int64_t bytes = bytes_of(w);
    if (passed + bytes > begin) {
      const std::int64_t first = passed >= begin ? 0 : element(w, begin - passed);
      const std::int64_t last = passed + bytes <= end ? w.count : element(w, end - passed);
      if (first < last) run_range(w, rows[w.row], first, last);
    }
    passed += bytes;
  }
}

}  // namespace

void run(const Work* work, std::size_t count, const Row* rows, std::int64_t bytes, bool ordered) {
  const int team = ordered ? 1 : threads();
  if (team == 1 || bytes < worth_a_region(team)) {
    for (std::size_t i = 0; i < count; ++i) run_range(work[i], rows[work[i].row], 0, work[i].count);
    return;
  }
  at::parallel_for(0, team, 1, [&](std::int64_t begin, std::int64_t end) {
    // A region may have fewer threads than was asked for: `begin` to `end` are shares, not threads.
    run_share(work, count, rows, bytes * begin / team, bytes * end / team);
  });
}

const KernelTable& kernels() {
  static const KernelTable& chosen = []() -> const KernelTable& {
#if FASTSGD_WIDE_KERNELS
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kernels_avx512;
    if (capability == "AVX2") return kernels_avx2;
#endif
    return kernels_baseline;
  }();
  return chosen;
}

int threads() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  (void)registered;
  return forked.load(std::memory_order_relaxed) ? 1 : at::get_num_threads();
}

void zero(const Row&, char* const* streams, std::int64_t count) {
  std::memset(streams[0], 0, static_cast<std::size_t>(count));
}

}  // namespace fastsgd
