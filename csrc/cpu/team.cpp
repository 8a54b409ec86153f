#include "cpu/team.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

// A parallel region by the names that GCC gives to it, which every OpenMP runtime has. From a
// pragma Clang would make calls that are LLVM's alone, and torch brings GCC's runtime.
extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
int omp_in_parallel();
}

namespace fastsgd {
namespace {

// The threads of a parallel region do not exist in a forked child, and waiting for them would hang.
std::atomic<bool> forked{false};

int available_cpus() {
  static const int cpus = [] {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  }();
  return cpus;
}

// Below this many bytes a parallel region costs more than it saves.
constexpr std::int64_t kWorthATeam = 4 << 20;

struct Shares {
  int team;
  void (*do_share)(const void* work, int share);
  const void* work;

  // Every so many of them, from one on.
  void each(int first, int stride) const noexcept {
    for (int share = first; share < team; share += stride) do_share(work, share);
  }
};

}  // namespace

int threads() { return forked.load(std::memory_order_relaxed) ? 1 : at::get_num_threads(); }

void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
}

int team_for(std::int64_t bytes) {
  const int team = threads();
  // One larger than the machine pays context switches at its barrier, so it must have more to do.
  const bool fits = team <= available_cpus();
  return bytes < (fits ? kWorthATeam : 16 * kWorthATeam) ? 1 : team;
}

void in_team(int team, void (*do_share)(const void* work, int share), const void* work) {
  Shares shares{team, do_share, work};
  if (team <= 1 || omp_in_parallel()) return shares.each(0, 1);
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see the barriers of a runtime, which are futex calls, and would take
  // each region for a race. It sees these threads begin and end.
  std::vector<std::thread> others;
  for (int i = 1; i < team; ++i) others.emplace_back([=] { shares.each(i, team); });
  shares.each(0, team);
  for (std::thread& other : others) other.join();
#else
  // There may be fewer threads than were asked for.
  const auto work_of_thread = [](void* all) {
    static_cast<const Shares*>(all)->each(omp_get_thread_num(), omp_get_num_threads());
  };
  GOMP_parallel(work_of_thread, &shares, static_cast<unsigned>(team), 0);
#endif
}

}  // namespace fastsgd
