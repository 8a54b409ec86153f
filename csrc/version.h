// A tensor's version, by which autograd knows whether a tensor that it has kept was written since.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>

namespace fastsgd {

// Torch keeps the counter from everyone. It is named here by members and not by where they lie: an
// explicit instantiation may name what is private.
template <auto kCounter, auto kVersion>
struct Revealed {
  friend std::atomic<std::uint32_t>* version_in(const c10::VariableVersion& counted) {
    return counted.enabled() ? &((counted.*kCounter).get()->*kVersion) : nullptr;
  }
};
std::atomic<std::uint32_t>* version_in(const c10::VariableVersion& counted);
template struct Revealed<&c10::VariableVersion::version_counter_,
                         &c10::VariableVersion::VersionCounter::version_>;

// Where a tensor's version lies; null where it has none, as one made in inference mode.
inline std::atomic<std::uint32_t>* version_of(const c10::TensorImpl& tensor) {
  return version_in(tensor.version_counter());
}

// Counts a write to a tensor, if it has a version, the GIL being held. Torch's own way locks the
// line, which takes longer than all else here. Whoever holds the GIL is not disturbed but by an
// operator at work on the same tensor in another thread. Then one of the two writes may not be
// counted; but the version is never again the one before them, which is all that autograd asks.
inline void count_write(c10::TensorImpl& tensor) {
  std::atomic<std::uint32_t>* version = version_of(tensor);
  if (version == nullptr) return;
  version->store(version->load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

}  // namespace fastsgd
