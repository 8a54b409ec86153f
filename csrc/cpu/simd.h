// Registers of the instruction set that this file is compiled for, as lanes; and how elements of
// each storage type are loaded into them and stored from them.
//
// Everything here has internal linkage or is always inlined: the file is compiled once for each
// instruction set, and a function shared between those copies would be one copy's for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "lane.h"

#if defined(__AVX512F__)
#define FASTSGD_REGISTER_BYTES 64
#elif defined(__AVX2__)
#define FASTSGD_REGISTER_BYTES 32
#else
#define FASTSGD_REGISTER_BYTES 16
#endif

namespace fastsgd {
namespace {

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int kLanes>
using Vector = typename VectorOf<T, kLanes* static_cast<int>(sizeof(T))>::type;

using FloatRegister = Vector<float, FASTSGD_REGISTER_BYTES / 4>;
using DoubleRegister = Vector<double, FASTSGD_REGISTER_BYTES / 8>;

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// The type that a storage type is computed in, alone and as a register.
template <class T>
struct Compute {
  using Scalar = float;
  using Register = FloatRegister;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Register = DoubleRegister;
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
template <class U32>
FASTSGD_LANE U32 float_bits_to_bfloat16(U32 bits) {
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = bits - bits + 0x7fc0u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

// --- half: without branches, for targets that have no instruction for it -----------------------

constexpr int kToNearestEven = 0;

// A half's exponent and mantissa sit 13 bits up in a float whose exponent is 112 smaller;
// multiplying by 2^112 sets it right, subnormals included. Infinity and NaN get the exponent of a
// float's.
FASTSGD_LANE float half_to_float(std::uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#endif
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fff) << 13;
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const std::uint32_t scaled = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  return bit_cast<float>(scaled | special | sign);
}

// Adding a power of two whose last bit is the half's last bit lets the addition itself round to the
// nearest, ties to even; what was added is then taken from the bits.
FASTSGD_LANE std::uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, kToNearestEven);
#endif
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
}

// GCC's headers fill the unused source of a masked conversion with an uninitialised register.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

// --- 16 bits to 32 and back: GCC makes two and three instructions of what is one ----------------

template <int kLanes>
FASTSGD_LANE Vector<std::uint32_t, kLanes> widen(const std::uint16_t* from) {
  using Wide = Vector<std::uint32_t, kLanes>;
#if defined(__AVX512F__)
  __m256i bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<Wide>(_mm512_cvtepu16_epi32(bits));
#elif defined(__AVX2__)
  __m128i bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<Wide>(_mm256_cvtepu16_epi32(bits));
#else
  Vector<std::uint16_t, kLanes> bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, Wide);
#endif
}

// The lower half of each.
template <int kLanes>
FASTSGD_LANE void narrow(std::uint16_t* to, const Vector<std::uint32_t, kLanes>& wide) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtepi32_epi16(bit_cast<__m512i>(wide));
#else
  const auto bits = __builtin_convertvector(wide, Vector<std::uint16_t, kLanes>);
#endif
  std::memcpy(to, &bits, sizeof(bits));
}

// --- load<L>, store: as many elements as the lane L is wide -------------------------------------

template <class L>
FASTSGD_LANE L load(const float* from) {
  L lane;
  std::memcpy(&lane, from, sizeof(L));
  return lane;
}
template <class L>
FASTSGD_LANE L load(const double* from) {
  L lane;
  std::memcpy(&lane, from, sizeof(L));
  return lane;
}
template <class L>
FASTSGD_LANE void store(float* to, const L& lane) {
  std::memcpy(to, &lane, sizeof(L));
}
template <class L>
FASTSGD_LANE void store(double* to, const L& lane) {
  std::memcpy(to, &lane, sizeof(L));
}

template <class L>
FASTSGD_LANE L load(const BFloat16* from) {
  if constexpr (sizeof(L) == sizeof(float)) {
    return bit_cast<float>(bfloat16_to_float_bits<std::uint32_t>(from->bits));
  } else {
    return bit_cast<L>(bfloat16_to_float_bits(widen<sizeof(L) / sizeof(float)>(&from->bits)));
  }
}
template <class L>
FASTSGD_LANE void store(BFloat16* to, const L& lane) {
  if constexpr (sizeof(L) == sizeof(float)) {
    to->bits = static_cast<std::uint16_t>(float_bits_to_bfloat16(bit_cast<std::uint32_t>(lane)));
  } else {
    constexpr int kLanes = sizeof(L) / sizeof(float);
    narrow<kLanes>(&to->bits,
                   float_bits_to_bfloat16(bit_cast<Vector<std::uint32_t, kLanes>>(lane)));
  }
}

template <class L>
FASTSGD_LANE L load(const Half* from) {
  if constexpr (sizeof(L) == sizeof(float)) {
    return half_to_float(from->bits);
  } else {
#if defined(__AVX512F__)
    __m256i bits;
    std::memcpy(&bits, from, sizeof(bits));
    return bit_cast<L>(_mm512_cvtph_ps(bits));
#elif defined(__F16C__)
    __m128i bits;
    std::memcpy(&bits, from, sizeof(bits));
    return bit_cast<L>(_mm256_cvtph_ps(bits));
#else
    L lane{};
    for (unsigned i = 0; i < sizeof(L) / sizeof(float); ++i) lane[i] = half_to_float(from[i].bits);
    return lane;
#endif
  }
}
template <class L>
FASTSGD_LANE void store(Half* to, const L& lane) {
  if constexpr (sizeof(L) == sizeof(float)) {
    to->bits = float_to_half(lane);
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtps_ph(bit_cast<__m512>(lane), kToNearestEven);
    std::memcpy(to, &bits, sizeof(bits));
#elif defined(__F16C__)
    const __m128i bits = _mm256_cvtps_ph(bit_cast<__m256>(lane), kToNearestEven);
    std::memcpy(to, &bits, sizeof(bits));
#else
    for (unsigned i = 0; i < sizeof(L) / sizeof(float); ++i) to[i].bits = float_to_half(lane[i]);
#endif
  }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

// A number in every element of a lane; a difference from zero keeps the sign of a zero.
template <class L, class T>
FASTSGD_LANE L broadcast(T value) {
  return value - L{};
}

}  // namespace

// --- what has no operator, for registers (lane.h has it for scalars) ----------------------------

namespace lane {

FASTSGD_LANE FloatRegister fma(FloatRegister a, FloatRegister b, FloatRegister c) {
#if defined(__AVX512F__)
  return bit_cast<FloatRegister>(
      _mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__FMA__)
  return bit_cast<FloatRegister>(
      _mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif FASTSGD_FUSED_MULTIPLY_ADD
  for (unsigned i = 0; i < sizeof(c) / sizeof(c[0]); ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

FASTSGD_LANE DoubleRegister fma(DoubleRegister a, DoubleRegister b, DoubleRegister c) {
#if defined(__AVX512F__)
  return bit_cast<DoubleRegister>(
      _mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
#elif defined(__FMA__)
  return bit_cast<DoubleRegister>(
      _mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
#elif FASTSGD_FUSED_MULTIPLY_ADD
  for (unsigned i = 0; i < sizeof(c) / sizeof(c[0]); ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// One instruction each: compilers know it by the loop.
FASTSGD_LANE FloatRegister sqrt(FloatRegister a) {
  for (unsigned i = 0; i < sizeof(a) / sizeof(a[0]); ++i) a[i] = sqrt(a[i]);
  return a;
}

FASTSGD_LANE DoubleRegister sqrt(DoubleRegister a) {
  for (unsigned i = 0; i < sizeof(a) / sizeof(a[0]); ++i) a[i] = sqrt(a[i]);
  return a;
}

}  // namespace lane
}  // namespace fastsgd
