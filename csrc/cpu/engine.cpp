#include "cpu/engine.h"

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/kernels.h"
#include "cpu/shares.h"
#include "cpu/strided.h"
#include "cpu/team.h"

namespace fastsgd {
namespace {

void zero(const Row&, const Around&, const Run* run, std::int64_t runs) {
  for (const Run* end = run + runs; run != end; ++run) {
    if (run->count == 0) continue;  // which may have no memory
    std::memset(run->stream[0], 0, static_cast<std::size_t>(run->count));
  }
}

Kernel kernel_of(const Span& span) {
  return span.kernel == kZero ? zero : kernels().by_number[span.kernel];
}

void execute_part(const Span& span, const Run& run, const Row& row, const Around& around,
                  std::int64_t begin, std::int64_t end) {
  if (span.layout != nullptr) {
    return execute_strided(kernel_of(span), span, run, row, around, begin, end);
  }
  Run part;
  for (int s = 0; s < span.streams; ++s) part.stream[s] = run.stream[s] + begin * span.size_of(s);
  part.count = end - begin;
  kernel_of(span)(row, around, &part, 1);
}

// Bytes of flat work that take as long as these spans, of so many bytes in all: what does not lie
// flat takes about four times as long.
std::int64_t weight(const std::vector<Span>& spans, const Run* runs, std::int64_t bytes) {
  for (const Span& span : spans) {
    if (span.layout != nullptr) bytes += 3 * runs[span.first].count * span.item_bytes();
  }
  return bytes;
}

}  // namespace

void execute(const std::vector<Span>& spans, const Run* runs, const Row* rows, const Around& around,
             std::int64_t bytes, bool ordered) {
  const int team = ordered ? 1 : team_for(weight(spans, runs, bytes));
  const auto whole = [&](const Span& span, const Run* first, std::int64_t count) {
    const Row& row = rows[span.row];
    if (span.layout != nullptr) {  // which is of one run
      return execute_strided(kernel_of(span), span, *first, row, around, 0, first->count);
    }
    kernel_of(span)(row, around, first, count);
  };
  if (team == 1) {
    for (const Span& span : spans) whole(span, runs + span.first, span.end - span.first);
    return;
  }
  in_team(team, [&](int share) {
    // A cut falls on a multiple of 64 elements, so that two workers do not write one cache line.
    visit_share(
        spans, runs, {share, team, bytes}, 64, [](const Span& span) { return span.item_bytes(); },
        whole,
        [&](const Span& span, const Run& run, std::int64_t first, std::int64_t last) {
          execute_part(span, run, rows[span.row], around, first, last);
        });
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

void fill(void* memory, std::int64_t count, Storage type, double value) {
  const auto fill_with = [&](auto item) {
    auto* items = static_cast<decltype(item)*>(memory);
    const int team = team_for(count * static_cast<std::int64_t>(sizeof(item)));
    in_team(team, [&](int share) {
      std::fill(items + count * share / team, items + count * (share + 1) / team, item);
    });
  };
  switch (type) {
    case Storage::kFloat:
      return fill_with(static_cast<float>(value));
    case Storage::kDouble:
      return fill_with(value);
    case Storage::kBFloat16:
      return fill_with(at::BFloat16(static_cast<float>(value)));
    case Storage::kHalf:
      return fill_with(at::Half(static_cast<float>(value)));
  }
}

}  // namespace fastsgd
