// The tables of the CPU kernels, one for each instruction set that they were compiled for.
#pragma once

#include "kernel.h"

namespace fastsgd {

extern const KernelTable kernels_baseline;
#if FASTSGD_WIDE_KERNELS
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
#endif

}  // namespace fastsgd
