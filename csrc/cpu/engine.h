// Runs a list of work on the CPU: one parallel region for all of it, or none when it is small.
#pragma once

#include <cstdint>
#include <vector>

#include "work.h"

namespace fastsgd {

// Does all the work, which moves `bytes`; in order on one thread where `ordered`.
void execute(const std::vector<Span>& spans, const Run* runs, const Row* rows, const Around& around,
             std::int64_t bytes, bool ordered);

// Measures the gradients of all the work. Neither order nor threads show in what it finds.
Measured measure(const std::vector<Span>& spans, const Run* runs, Order order);

// The kernels for the instruction set that torch uses here (ATEN_CPU_CAPABILITY included).
const KernelTable& kernels();

// Sets new memory to a value; on several threads where it is long, as its pages are made then.
void fill(void* memory, std::int64_t count, Storage type, double value);

}  // namespace fastsgd
