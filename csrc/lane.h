// A lane is what a rule computes on: a float or a double on a CUDA thread and in a loop's tail, a
// whole register in a CPU loop's body. Operators + - * / work on all of them; what has no operator
// is named here for scalars, and in cpu/simd.h for registers.
#pragma once

#if defined(__CUDACC__)
#define FASTSGD_LANE __host__ __device__ __forceinline__
#else
#define FASTSGD_LANE inline __attribute__((always_inline))
#endif

// Multiply-adds are fused where the target has the instruction and nowhere else: torch's kernels
// for the same target do so, and the results are compared bit for bit.
#if defined(FASTSGD_FUSED_MULTIPLY_ADD)
#elif defined(__FMA__) || defined(__CUDA_ARCH__) || defined(__ARM_FEATURE_FMA)
#define FASTSGD_FUSED_MULTIPLY_ADD 1
#else
#define FASTSGD_FUSED_MULTIPLY_ADD 0
#endif

namespace fastsgd::lane {

// a * b + c.
FASTSGD_LANE float fma(float a, float b, float c) {
#if FASTSGD_FUSED_MULTIPLY_ADD
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FASTSGD_LANE double fma(double a, double b, double c) {
#if FASTSGD_FUSED_MULTIPLY_ADD
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Correctly rounded, which torch's is not.
FASTSGD_LANE float sqrt(float a) { return __builtin_sqrtf(a); }
FASTSGD_LANE double sqrt(double a) { return __builtin_sqrt(a); }

// The greater of two; a NaN if either is one.
template <class L>
FASTSGD_LANE L max(L a, L b) {
  const L greater = a > b ? a : b;  // b where either is a NaN
  return a == a ? greater : a;
}

}  // namespace fastsgd::lane
