#include <algorithm>
#include <mutex>
#include <vector>

#include "cpu/engine.h"
#include "cpu/shares.h"
#include "cpu/strided.h"
#include "cpu/team.h"
#include "prefetch.h"

namespace fastsgd {
namespace {

// Elements of one run from a multiple of kPiece on, where its gradient lies in another order.
void measure_strided(Measured& measured, Order order, Measure measure, const Span& span,
                     const Run& run, std::int64_t begin, std::int64_t end) {
  alignas(64) char tile[kPiece * sizeof(double)];
  for (std::int64_t count; begin < end; begin += count) {
    count = std::min(end - begin, kPiece);
    gather(span, run, kGrad, begin, count, tile);
    measured.add(measure(tile, count), order);
  }
}

void measure_run(Measured& measured, Order order, Measure measure, const Span& span, const Run& run,
                 std::int64_t begin, std::int64_t end) {
  if (span.layout != nullptr && !span.layout->flat(kGrad)) {
    return measure_strided(measured, order, measure, span, run, begin, end);
  }
  for (; begin < end; begin += kPiece) {
    const std::int64_t count = std::min(end - begin, kPiece);
    measured.add(measure(run.stream[kGrad] + begin * span.item_size, count), order);
  }
}

void measure_runs(Measured& measured, Order order, const Measure* measures, const Span& span,
                  const Run* run, std::int64_t runs) {
  const Measure kernel = measures[span.storage()];
  for (const Run* end = run + runs; run != end; ++run) {
    if (static_cast<std::size_t>(end - run) > kAhead) prefetch(run[kAhead].stream[kGrad]);
    measure_run(measured, order, kernel, span, *run, 0, run->count);
  }
}

}  // namespace

Measured measure(const std::vector<Span>& spans, const Run* runs, Order order) {
  std::int64_t bytes = 0;
  for (const Span& span : spans) {
    for (std::int64_t r = span.first; span.is_step() && r < span.end; ++r) {
      bytes += runs[r].count * span.item_size;
    }
  }
  const int team = team_for(bytes);
  const Measure* measures = kernels().measures(order);
  Measured all{};
  if (team == 1) {
    for (const Span& span : spans) {
      if (!span.is_step()) continue;
      measure_runs(all, order, measures, span, runs + span.first, span.end - span.first);
    }
    return all;
  }
  std::mutex adding;
  in_team(team, [&](int share) {
    Measured measured{};  // of this thread alone, and so of its cache
    visit_share(
        spans, runs, {share, team, bytes}, kPiece,
        [](const Span& span) { return span.is_step() ? span.item_size : 0; },
        [&](const Span& span, const Run* first, std::int64_t count) {
          measure_runs(measured, order, measures, span, first, count);
        },
        [&](const Span& span, const Run& run, std::int64_t first, std::int64_t last) {
          measure_run(measured, order, measures[span.storage()], span, run, first, last);
        });
    const std::lock_guard<std::mutex> lock(adding);
    all.add(measured);  // nothing is rounded: whose turn it is does not show
  });
  return all;
}

}  // namespace fastsgd
