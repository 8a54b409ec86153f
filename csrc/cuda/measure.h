// The norm of gradients, as functions of a block. A block measures some pieces: of each piece a
// thread measures some elements, always the same ones, and what they found is joined two by two; so
// nothing of how the work was cut shows in the sum of a piece, nor, as they are added without
// rounding, in that of all. It is computed in double, like the CPU's, and in another order within a
// piece.
#pragma once

#include "cuda/block.h"

namespace fastsgd::cuda {

static_assert(kPiece % (kThreads * kPackBytes / 2) == 0);

// What a thread has found: squares in two doubles, or the greatest magnitude.
struct Part {
  double sum, rest;
  bool not_finite;
};

template <class T>
struct PieceBlock {
  // A square of less than 53 bits leaves room to add to.
  static constexpr bool kRest = sizeof(T) == sizeof(double);
  // Packs that are asked for before the first is taken: one at a time would wait for memory.
  static constexpr int kAhead = 4;

  const T* grad;
  int count;
  bool laid_out;
  Corner corner;
  Part part[kThreads];

  FASTSGD_LANE void prepare(const Tables& tables, char* const* grads_here, std::int64_t block,
                            bool is_laid_out) {
    const Chunk& chunk = tables.chunks[block];
    count = chunk.count;
    laid_out = is_laid_out;
    grad = reinterpret_cast<const T*>(grad_of(tables, grads_here, chunk)) +
           corner.find(tables, chunk, laid_out);
  }

  template <Order kOrder>
  FASTSGD_LANE static void take(Part& part, double x, double factor) {
    if constexpr (kOrder == Order::kInfinity) {
      part.sum = lane::max(part.sum, lane::max(x, -x));
    } else if constexpr (kRest) {
      part.not_finite |= x - x != 0;  // a square that is not need not come of such an element
      x *= factor;
      add<kRest>(part, x * x);
    } else {
      add<kRest>(part, x * x);
    }
  }
  template <bool kKeeps>
  FASTSGD_LANE static void add(Part& part, double x) {
    if constexpr (kKeeps) {
      add_keeping_rest(x, part.sum, part.rest);
    } else {
      part.sum += x;
    }
  }

  // A thread's elements.
  template <Order kOrder>
  FASTSGD_LANE void measure(int thread, double factor) {
    constexpr int kPack = Pack<T>::kSize;
    const T* from = grad;
    FASTSGD_ASSUME_GLOBAL(from);
    const bool packed = over_alignment(from) == 0;
    Part mine{};
    const auto take_pack = [&](const Pack<T>& pack) {
      for (int k = 0; k < kPack; ++k) take<kOrder>(mine, to_scalar(pack.item[k]), factor);
    };
    constexpr int kStride = kThreads * kPack;
    const auto load = [&](Pack<T>& pack, int at) {
      if (packed) {
        pack = pack_at<const Pack<T>>(from + at);
      } else {
        for (int k = 0; k < kPack; ++k) pack.item[k] = from[at + k];
      }
    };
    int i = thread * kPack;
    for (; !laid_out && i + (kAhead - 1) * kStride + kPack <= count; i += kAhead * kStride) {
      Pack<T> packs[kAhead];
      for (int a = 0; a < kAhead; ++a) load(packs[a], i + a * kStride);
      for (int a = 0; a < kAhead; ++a) take_pack(packs[a]);
    }
    for (; i < count; i += kStride) {
      Pack<T> pack{};
      if (!laid_out && i + kPack <= count) {
        load(pack, i);
      } else {
        for (int k = 0; k < kPack && i + k < count; ++k) {
          std::int64_t at[1] = {i + k};
          if (laid_out) corner.locate(i + k, kGrad, at);
          pack.item[k] = from[at[0]];
        }
      }
      take_pack(pack);
    }
    if (!kRest || kOrder == Order::kInfinity) mine.not_finite = mine.sum - mine.sum != 0;
    part[thread] = mine;
  }

  template <Order kOrder>
  FASTSGD_LANE void join(int thread, int other) {
    Part& mine = part[thread];
    const Part& theirs = part[other];
    mine.not_finite |= theirs.not_finite;
    if constexpr (kOrder == Order::kInfinity) {
      mine.sum = lane::max(mine.sum, theirs.sum);
    } else {
      add<kRest>(mine, theirs.sum);
      mine.rest += theirs.rest;
    }
  }

  template <Order kOrder>
  FASTSGD_LANE PieceMeasured run(Scaled scaled) {
    const double factor = scaled == Scaled::kNot    ? 1
                          : scaled == Scaled::kDown ? kScaledDown
                                                    : kScaledUp;
    all_threads([&](int thread) { measure<kOrder>(thread, factor); });
    for (int half = kThreads / 2; half > 0; half /= 2) {
      all_threads([&](int thread) {
        if (thread < half) join<kOrder>(thread, thread + half);
      });
    }
    const Part& all = part[0];
    const double rest = kRest && !all.not_finite ? all.rest : 0;
    return {all.sum, rest, all.not_finite, scaled};
  }

  // The piece, known to every thread.
  template <Order kOrder>
  FASTSGD_LANE PieceMeasured run() {
    const PieceMeasured measured = run<kOrder>(Scaled::kNot);
    if constexpr (!kRest || kOrder == Order::kInfinity) return measured;
    const Scaled wanted = measured.out_of_range(kRest);
    if (wanted == Scaled::kNot) return measured;
    all_threads([](int) {});  // all have read the first
    return run<kOrder>(wanted);
  }
};

// --- all pieces ---------------------------------------------------------------------------------

// Joins in what is found elsewhere at the same time.
FASTSGD_LANE void join_sum(std::int64_t& sum, std::int64_t part) {
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(&sum), static_cast<unsigned long long>(part));
#else
  sum += part;
#endif
}
FASTSGD_LANE void join_bits(unsigned& bits, unsigned part) {
#if defined(__CUDA_ARCH__)
  atomicOr(&bits, part);
#else
  bits |= part;
#endif
}
// Of numbers without a sign, whose bits are in their order; a NaN's come after all.
FASTSGD_LANE void join_greatest(double& greatest, double x) {
  const std::uint64_t bits = bit_cast<std::uint64_t>(x) << 1 >> 1;
#if defined(__CUDA_ARCH__)
  atomicMax(reinterpret_cast<unsigned long long*>(&greatest), bits);
#else
  if (bits > bit_cast<std::uint64_t>(greatest)) greatest = bit_cast<double>(bits);
#endif
}
FASTSGD_LANE void join(ExactSum& sum, const ExactSum& part, int thread) {
  for (int i = thread; i < ExactSum::kPlaces; i += kThreads) {
    if (part.place[i] != 0) join_sum(sum.place[i], part.place[i]);
  }
  if (thread == 0 && part.special != 0) join_bits(sum.special, part.special);
}

// A thread's share of joining what a block has found into what all have.
FASTSGD_LANE void join(Measured& measured, const Measured& found, int thread) {
  join(measured.squares, found.squares, thread);
  join(measured.scaled_down, found.scaled_down, thread);
  join(measured.scaled_up, found.scaled_up, thread);
  if (thread != 0) return;
  if (found.greatest != 0) join_greatest(measured.greatest, found.greatest);
  if (found.not_finite != 0) join_bits(measured.not_finite, 1);
}

// What is measured, as words, whatever its members are.
using Word __attribute__((may_alias)) = std::uint64_t;

// Calls with a thread's share of them.
template <class Act>
FASTSGD_LANE void each_word(int thread, Act act) {
  static_assert(sizeof(Measured) % sizeof(Word) == 0);
  constexpr int kWords = sizeof(Measured) / sizeof(Word);
  for (int i = thread; i < kWords; i += kThreads) act(i);
}

FASTSGD_LANE void clear(Measured& found, int thread) {
  auto* to = reinterpret_cast<Word*>(&found);
  each_word(thread, [&](int i) { to[i] = 0; });
}

// What is measured of the whole is brought to the block, and zeros left behind.
FASTSGD_LANE void take_all(Standing& standing, Measured& found, int thread) {
  auto* from = reinterpret_cast<volatile Word*>(&standing.measured);
  auto* to = reinterpret_cast<Word*>(&found);
  each_word(thread, [&](int i) {
    to[i] = from[i];
    from[i] = 0;
  });
}

// What the step is to know.
FASTSGD_LANE void conclude(const Tables& tables, Measured& found) {
  const Measuring& what = tables.measuring;
  Standing& standing = *tables.standing;
  const double scale = tables.grad_scale == nullptr ? 1 : *tables.grad_scale;
  standing.norm = norm_of(found, what.order, scale, what.is_double);
  standing.factor = clip_factor(standing.norm, what.is_double, what.max_norm);
  const bool raises = what.raises && standing.norm - standing.norm != 0;
  standing.skips = raises || (what.skips && found.not_finite != 0) ? 1 : 0;
  standing.skipped += standing.skips;
}

// What a block does: `piece`, `found` and `last` are its own.
template <Order kOrder, class T>
FASTSGD_LANE void measure_block(const Tables& tables, char* const* grads_here, std::int64_t block,
                                int blocks, bool laid_out, PieceBlock<T>& piece, Measured& found,
                                bool& last) {
  if (overflowed(tables)) return;
  std::int64_t at = block;
  const auto prepare = [&] { piece.prepare(tables, grads_here, at, laid_out); };
  all_threads([&](int thread) {
    clear(found, thread);
    if (thread == 0) prepare();
  });
  while (at < tables.chunk_count) {
    const PieceMeasured measured = piece.template run<kOrder>();
    at += blocks;
    all_threads([&](int thread) {
      if (thread != 0) return;
      found.add(measured, kOrder);
      if (at < tables.chunk_count) prepare();
    });
  }
  all_threads([&](int thread) { join(tables.standing->measured, found, thread); });
  all_threads([&](int thread) {
    if (thread == 0) last = tables.last && is_last(tables.standing->ticket, blocks);
  });
  if (!last) return;
  all_threads([&](int thread) { take_all(*tables.standing, found, thread); });
  all_threads([&](int thread) {
    if (thread == 0) conclude(tables, found);
  });
}

}  // namespace fastsgd::cuda
