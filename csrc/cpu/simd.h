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
#include "storage.h"

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

// The register that elements of a storage type are computed in.
template <class Scalar>
struct RegisterOf {
  using type = FloatRegister;
};
template <>
struct RegisterOf<double> {
  using type = DoubleRegister;
};

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

// Of numbers that fit.
template <int kLanes>
FASTSGD_LANE void narrow(std::uint16_t* to, const Vector<std::uint32_t, kLanes>& wide) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_cvtepi32_epi16(bit_cast<__m512i>(wide));
#elif defined(__AVX2__)
  const auto both = bit_cast<__m256i>(wide);
  const __m128i bits =
      _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
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
    return to_scalar(*from);
  } else {
    return bit_cast<L>(bfloat16_to_float_bits(widen<sizeof(L) / sizeof(float)>(&from->bits)));
  }
}
template <class L>
FASTSGD_LANE void store(BFloat16* to, const L& lane) {
  if constexpr (sizeof(L) == sizeof(float)) {
    to_storage(lane, *to);
  } else {
    constexpr int kLanes = sizeof(L) / sizeof(float);
    narrow<kLanes>(&to->bits, float_to_bfloat16_bits<Vector<std::uint32_t, kLanes>>(lane));
  }
}

template <class L>
FASTSGD_LANE L load(const Half* from) {
  if constexpr (sizeof(L) == sizeof(float)) {
    return to_scalar(*from);
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
    for (unsigned i = 0; i < sizeof(L) / sizeof(float); ++i) lane[i] = to_scalar(from[i]);
    return lane;
#endif
  }
}
template <class L>
FASTSGD_LANE void store(Half* to, const L& lane) {
  if constexpr (sizeof(L) == sizeof(float)) {
    to_storage(lane, *to);
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtps_ph(bit_cast<__m512>(lane), kToNearestEven);
    std::memcpy(to, &bits, sizeof(bits));
#elif defined(__F16C__)
    const __m128i bits = _mm256_cvtps_ph(bit_cast<__m256>(lane), kToNearestEven);
    std::memcpy(to, &bits, sizeof(bits));
#else
    for (unsigned i = 0; i < sizeof(L) / sizeof(float); ++i) to_storage(lane[i], to[i]);
#endif
  }
}

// --- as many elements in double as a register holds ---------------------------------------------

FASTSGD_LANE DoubleRegister load_doubles(const double* from) { return load<DoubleRegister>(from); }
FASTSGD_LANE DoubleRegister load_doubles(const float* from) {
#if defined(__AVX512F__)
  return bit_cast<DoubleRegister>(_mm512_cvtps_pd(_mm256_loadu_ps(from)));
#elif defined(__AVX2__)
  return bit_cast<DoubleRegister>(_mm256_cvtps_pd(_mm_loadu_ps(from)));
#else
  Vector<float, sizeof(DoubleRegister) / sizeof(double)> floats;
  std::memcpy(&floats, from, sizeof(floats));
  return __builtin_convertvector(floats, DoubleRegister);
#endif
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
