// The CPU kernels of one instruction set: compiled once for each, FASTSGD_ISA saying which.
//
// Includes nothing of torch and no template of the standard library: such a function, compiled here
// for a wide instruction set, could be the one copy that the linker keeps for every other file.
#include "cpu/simd.h"  // before the rules: registers have no namespace to be looked up in

#include "cpu/kernels.h"
#include "prefetch.h"

namespace fastsgd {
namespace {

// What the engine does to a gradient between loading it and the rule.
template <class L>
struct Gradient {
  L scale;
  bool unscale, maximize;
};

// As many elements as L holds, from memory through the rule and back.
template <class R, int kStructure, class L, class T>
FASTSGD_LANE void advance(const typename R::template Scalars<L>& scalars,
                          const Gradient<L>& gradient, T* param, T* grad, T* const* state) {
  constexpr int kStates = size_of(R::states(kStructure));
  L p = load<L>(param), g = load<L>(grad), s[kStates + 1];
  for (int i = 0; i < kStates; ++i) s[i] = load<L>(state[i]);
  if (gradient.unscale) store(grad, g = g / gradient.scale);
  if (gradient.maximize) g = -g;
  R::template update<kStructure>(scalars, p, g, s);
  for (int i = 0; i < kStates; ++i) store(state[i], s[i]);
  store(param, p);
}

// All elements of each run: registers while they fit, then single elements.
template <class R, int kStructure, class T>
void step(const Row& row, const Run* run, std::int64_t runs) {
  using Scalar = typename Compute<T>::Scalar;
  using Register = typename RegisterOf<Scalar>::type;
  constexpr int kStates = size_of(R::states(kStructure));
  constexpr std::int64_t kLanes = sizeof(Register) / sizeof(Scalar);

  typename R::template Scalars<double> exact;
  __builtin_memcpy(&exact, row.scalars, sizeof(exact));
  const auto scalars = exact.each([](double x) { return static_cast<Scalar>(x); });
  const auto wide = scalars.each([](Scalar x) { return broadcast<Register>(x); });
  const Gradient<Scalar> gradient{static_cast<Scalar>(row.grad_scale), row.unscale, row.maximize};
  const Gradient<Register> wide_gradient{broadcast<Register>(gradient.scale), row.unscale,
                                         row.maximize};

  for (const Run* end = run + runs; run != end; ++run) {
    if (static_cast<std::size_t>(end - run) > kAhead) {
      for (int i = 0; i < kState + kStates; ++i) prefetch(run[kAhead].stream[i]);
    }
    T* param = reinterpret_cast<T*>(run->stream[kParam]);
    T* grad = reinterpret_cast<T*>(run->stream[kGrad]);
    T* state[kStates + 1];
    for (int i = 0; i < kStates; ++i) state[i] = reinterpret_cast<T*>(run->stream[kState + i]);
    const auto pass = [&](std::int64_t elements) {
      param += elements;
      grad += elements;
      for (int i = 0; i < kStates; ++i) state[i] += elements;
    };
    std::int64_t left = run->count;
    for (; left >= kLanes; left -= kLanes, pass(kLanes)) {
      advance<R, kStructure>(wide, wide_gradient, param, grad, state);
    }
    for (; left > 0; --left, pass(1)) {
      advance<R, kStructure>(scalars, gradient, param, grad, state);
    }
  }
}

// --- the table ----------------------------------------------------------------------------------

constexpr KernelTable table(const char* instruction_set) {
  KernelTable table{instruction_set, {}};
  fill_kernels(
      table.step,
      []<class R, int kStructure, class T>(Instance<R, kStructure, T>) {
        return step<R, kStructure, T>;
      },
      Rules{});
  return table;
}

#define FASTSGD_TEXT_OF(name) #name
#define FASTSGD_TEXT(name) FASTSGD_TEXT_OF(name)
#define FASTSGD_JOIN_OF(a, b) a##b
#define FASTSGD_JOIN(a, b) FASTSGD_JOIN_OF(a, b)

}  // namespace

extern const KernelTable FASTSGD_JOIN(kernels_, FASTSGD_ISA) = table(FASTSGD_TEXT(FASTSGD_ISA));

}  // namespace fastsgd
