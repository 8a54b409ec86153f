// The total norm of a step's gradients, and the factor by which it clips them. Free of torch.
#pragma once

#include <cstdint>

#include "exact_sum.h"
#include "lane.h"

namespace fastsgd {

// Which norm: the root of the sum of squares, or the greatest magnitude.
enum class Order : std::uint8_t { kTwo, kInfinity };

// A gradient is measured in pieces of so many elements, counted from its first, whoever does it.
inline constexpr std::int64_t kPiece = 8192;
inline constexpr int kMeasureLanes = 16;  // whose sums are added up at the end, on any registers

// Squares of doubles may be too large or too small for doubles. Such pieces are measured once more,
// scaled by a power of 2.
enum class Scaled : std::uint8_t { kNot, kDown, kUp };
inline constexpr double kScaledDown = 0x1p-600, kScaledUp = 0x1p600;
inline constexpr int kSquaresDown = -1200;  // the power of 2 by which squares are, then
// Below this a sum of squares may have lost digits of them.
inline constexpr double kSmallSquares = 0x1p-900;

// Of one piece: the sum is high + low.
struct PieceMeasured {
  double high, low;  // by order infinity: the greatest magnitude, and 0
  bool not_finite;
  Scaled scaled;

  // How the elements must be scaled to be measured once more: down if their squares overflowed
  // though all of them are finite, up if the sum of doubles' squares is so small that some may have
  // lost digits; kNot if the sum is good.
  FASTSGD_LANE Scaled out_of_range(bool of_doubles) const {
    if (high - high != 0) return not_finite ? Scaled::kNot : Scaled::kDown;
    return of_doubles && high < kSmallSquares ? Scaled::kUp : Scaled::kNot;
  }
};

// What has been measured of some gradients.
struct Measured {
  ExactSum squares, scaled_down, scaled_up;
  double greatest;      // magnitude; a NaN if any element is one
  unsigned not_finite;  // some element is infinite or a NaN

  FASTSGD_LANE void add(const Measured& other) {
    squares.add(other.squares);
    scaled_down.add(other.scaled_down);
    scaled_up.add(other.scaled_up);
    greatest = lane::max(greatest, other.greatest);
    not_finite |= other.not_finite;
  }
  FASTSGD_LANE void add(const PieceMeasured& piece, Order order) {
    not_finite |= piece.not_finite;
    if (order == Order::kInfinity) {
      greatest = lane::max(greatest, piece.high);
      return;
    }
    ExactSum& exact = sum(piece.scaled);
    exact.add(piece.high);
    if (piece.low != 0) exact.add(piece.low);
  }
  FASTSGD_LANE ExactSum& sum(Scaled scaled) {
    return scaled == Scaled::kNot ? squares : scaled == Scaled::kDown ? scaled_down : scaled_up;
  }
  // The root of the sum of squares.
  FASTSGD_LANE double root() {
    const double sum = squares.value(), large = scaled_down.value(), small = scaled_up.value();
    const bool overflows = sum - sum != 0 && squares.special == 0;  // though no piece does
    if (large > 0 || overflows) {
      return lane::sqrt(large + squares.value(kSquaresDown)) / kScaledDown;
    }
    if (sum < kSmallSquares) {
      return lane::sqrt(small + sum * kScaledUp * kScaledUp) / kScaledUp;
    }
    return lane::sqrt(sum + small / kScaledUp / kScaledUp);
  }
};

// Adds to a sum, and to the rest what the sum could not take (Knuth's two-sum).
template <class L>
FASTSGD_LANE void add_keeping_rest(L x, L& sum, L& rest) {
  const L total = sum + x, taken = total - sum;
  rest = rest + ((sum - (total - taken)) + (x - taken));
  sum = total;
}

// min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ computes it in a tensor of
// the norm's type: the reciprocal times max_norm. A NaN stays one.
template <class T>
FASTSGD_LANE T clip_factor_in(T norm, double max_norm) {
  const T factor = (T{1} / (norm + static_cast<T>(1e-6))) * static_cast<T>(max_norm);
  return factor > 1 ? T{1} : factor;
}
FASTSGD_LANE double clip_factor(double norm, bool is_double, double max_norm) {
  return is_double ? clip_factor_in<double>(norm, max_norm)
                   : clip_factor_in<float>(static_cast<float>(norm), max_norm);
}

// The norm of gradients that are still multiplied by a scale: the nearest number of the norm's
// type, or next to it.
FASTSGD_LANE double norm_of(Measured& measured, Order order, double scale, bool is_double) {
  const double norm = (order == Order::kTwo ? measured.root() : measured.greatest) / scale;
  return is_double ? norm : static_cast<double>(static_cast<float>(norm));
}

}  // namespace fastsgd
