#include "counters.h"

#include "version.h"

namespace fastsgd {

void Counters::collect(std::vector<Range>& writes) const {
  for (const Counter& counter : kept()) {
    const auto begin = reinterpret_cast<std::uintptr_t>(counter.data);
    writes.push_back({begin, begin + (counter.is_double ? sizeof(double) : sizeof(float))});
  }
}

void Counters::bump_versions() const {
  for (const Counter& counter : kept()) count_write(*counter.tensor);
}

void Counters::advance() const {
  for (const Counter& counter : kept()) {
    const double next = value_after(counter);
    if (counter.is_double) {
      *reinterpret_cast<double*>(counter.data) = next;
    } else {
      *reinterpret_cast<float*>(counter.data) = static_cast<float>(next);
    }
  }
}

}  // namespace fastsgd
