// One element of each storage type, and the number that a rule computes with. Free of torch, so
// that any compiler for any device can build it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "lane.h"

namespace fastsgd {

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// What a storage type is computed in.
template <class T>
struct Compute {
  using Scalar = float;
};
template <>
struct Compute<double> {
  using Scalar = double;
};

template <class To, class From>
FASTSGD_LANE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// --- bfloat16: the upper half of a float --------------------------------------------------------

template <class U32>
FASTSGD_LANE U32 bfloat16_to_float_bits(U32 bits) {
  return bits << 16;
}

// Rounds to the nearest, ties to even: adding 0x7fff plus the last kept bit carries into the upper
// half exactly when that half must grow. A NaN is kept a NaN, torch's 0x7fc0.
template <class U32, class L>
FASTSGD_LANE U32 float_to_bfloat16_bits(const L& x) {
  const U32 bits = bit_cast<U32>(x);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = bits - bits + 0x7fc0u;
  return x != x ? nan : rounded;
}

// --- half: without branches, for targets that have no instruction for it -----------------------

constexpr int kToNearestEven = 0;

// A half's exponent and mantissa sit 13 bits up in a float whose exponent is 112 smaller;
// multiplying by 2^112 sets it right, subnormals included. Infinity and NaN get the exponent of a
// float's.
FASTSGD_LANE float half_to_float(std::uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#elif defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fff) << 13;
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const std::uint32_t scaled = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  return bit_cast<float>(scaled | special | sign);
#endif
}

// Adding a power of two whose last bit is the half's last bit lets the addition itself round to the
// nearest, ties to even; what was added is then taken from the bits.
FASTSGD_LANE std::uint16_t float_to_half(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#elif defined(__F16C__)
  return _cvtss_sh(value, kToNearestEven);
#else
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t exponent = magnitude & 0x7f800000u;
  exponent = exponent < 0x38800000u ? 0x38800000u : exponent;  // below 2^-14 a half is subnormal
  const std::uint32_t anchor = exponent + (13u << 23);
  const bool overflow = magnitude >= 0x477ff000u;  // rounds to 65536 or more
  const float small = overflow ? 0.0f : bit_cast<float>(magnitude);
  const std::uint32_t sum = bit_cast<std::uint32_t>(small + bit_cast<float>(anchor)) -
                            anchor;  // mantissa, with its carry
  const std::uint32_t finite = sum + ((exponent - 0x38800000u) >> 13);
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  return static_cast<std::uint16_t>(sign | (overflow ? special : finite));
#endif
}

// --- an element, and its number -----------------------------------------------------------------

FASTSGD_LANE float to_scalar(float stored) { return stored; }
FASTSGD_LANE double to_scalar(double stored) { return stored; }
FASTSGD_LANE float to_scalar(BFloat16 stored) {
  return bit_cast<float>(bfloat16_to_float_bits<std::uint32_t>(stored.bits));
}
FASTSGD_LANE float to_scalar(Half stored) { return half_to_float(stored.bits); }

FASTSGD_LANE void to_storage(float value, float& stored) { stored = value; }
FASTSGD_LANE void to_storage(double value, double& stored) { stored = value; }
FASTSGD_LANE void to_storage(float value, BFloat16& stored) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // A NaN becomes torch's 0x7fff there. By integers it took AdamW 22 instructions more an element.
  stored.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  stored.bits = static_cast<std::uint16_t>(float_to_bfloat16_bits<std::uint32_t>(value));
#endif
}
FASTSGD_LANE void to_storage(float value, Half& stored) { stored.bits = float_to_half(value); }

}  // namespace fastsgd
