// The CPU kernels of one instruction set: compiled once for each, FASTSGD_ISA saying which.
//
// Includes nothing of torch and no template of the standard library: such a function, compiled here
// for a wide instruction set, could be the one copy that the linker keeps for every other file.
#include "cpu/simd.h"  // before the rules: registers have no namespace to be looked up in

#include "cpu/kernels.h"
#include "cpu/measure.h"
#include "prefetch.h"

namespace fastsgd {
namespace {

// What follows the parameter's update, which `p` is as it was stored.
template <class L, class T>
FASTSGD_LANE void follow(const Around& around, const AroundLanes<L>& lanes, L p, T* grad,
                         char* average, std::int64_t at) {
  if (around.averages) {
    const auto keep = [&](auto* to) { store(to, lanes.average(around, load<L>(to), p)); };
    if (around.wide && sizeof(T) < sizeof(float)) {
      keep(reinterpret_cast<float*>(average) + at);
    } else {
      keep(reinterpret_cast<T*>(average) + at);
    }
  }
  if (around.clears) store(grad, L{});
}

// As many elements as L holds, from memory through the rule and back; `kAround` if anything is done
// around it.
template <class R, int kStructure, bool kAround, class L, class T>
FASTSGD_LANE void advance(const typename R::template Scalars<L>& scalars, const Around& around,
                          const AroundLanes<L>& lanes, bool maximize, char* const* stream,
                          std::int64_t at) {
  constexpr int kStates = size_of(R::states(kStructure));
  const auto elements = [&](int s) { return reinterpret_cast<T*>(stream[s]) + at; };
  T *param = elements(kParam), *grad = elements(kGrad);
  L p = load<L>(param), g = load<L>(grad), s[kStates + 1];
  for (int i = 0; i < kStates; ++i) s[i] = load<L>(elements(kState + i));
  if (kAround && around.before()) {
    if (around.unscales) g = g / lanes.grad_scale;
    if (around.keeps_unscaled) store(grad, g);
    g = lanes.clip(around, g);
  }
  if (maximize) g = -g;
  R::template update<kStructure>(scalars, p, g, s);
  for (int i = 0; i < kStates; ++i) store(elements(kState + i), s[i]);
  store(param, p);
  if (kAround && around.after()) {
    follow(around, lanes, load<L>(param), grad, stream[kState + kStates], at);
  }
}

template <class Register, class Scalar>
FASTSGD_LANE AroundLanes<Register> wide_lanes_of(const AroundLanes<Scalar>& lanes) {
  return {broadcast<Register>(lanes.grad_scale), broadcast<Register>(lanes.factor),
          broadcast<Register>(lanes.bound), broadcast<Register>(lanes.weight)};
}

// The beginnings of streams. What follows hardware finds out by itself, which takes it a few lines.
template <class T>
FASTSGD_LANE void fetch(const Run& run, int streams) {
  constexpr std::int64_t kFetched = 4 * kCacheLine / sizeof(T);
  const std::int64_t count = run.count < kFetched ? run.count : kFetched;
  for (int i = 0; i < streams; ++i) {
    const T* elements = reinterpret_cast<const T*>(run.stream[i]);
    for (std::int64_t at = 0; at < count; at += kCacheLine / sizeof(T)) prefetch(elements + at);
  }
}

// All elements of a run: registers while they fit, then single elements.
template <class Register, class Scalar, class Wide, class Narrow>
FASTSGD_LANE void go_over(std::int64_t count, Wide wide, Narrow narrow) {
  constexpr std::int64_t kLanes = sizeof(Register) / sizeof(Scalar);
  std::int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) wide(at);
  for (; at < count; ++at) narrow(at);
}

template <class R, int kStructure, class T, bool kAround>
FASTSGD_LANE void step_runs(const Row& row, const Around& step_around, const Run* run,
                            std::int64_t runs) {
  using Scalar = typename Compute<T>::Scalar;
  using Register = typename RegisterOf<Scalar>::type;
  constexpr int kStates = size_of(R::states(kStructure));

  typename R::template Scalars<double> exact;
  __builtin_memcpy(&exact, row.scalars, sizeof(exact));
  const auto scalars = exact.each([](double x) { return static_cast<Scalar>(x); });
  const auto wide = scalars.each([](Scalar x) { return broadcast<Register>(x); });
  const Around around = step_around;  // here, where no store can be to it
  const auto around_scalars = lanes_of<Scalar>(around);
  const auto around_wide = wide_lanes_of<Register>(around_scalars);
  const int streams = kState + kStates + (kAround && around.averages ? 1 : 0);

  for (const Run* end = run + runs; run != end; ++run) {
    if (static_cast<std::size_t>(end - run) > kAhead) fetch<T>(run[kAhead], streams);
    char* stream[kState + kStates + 1];
    for (int i = 0; i < streams; ++i) stream[i] = run->stream[i];
    go_over<Register, Scalar>(
        run->count,
        [&](std::int64_t at) {
          advance<R, kStructure, kAround, Register, T>(wide, around, around_wide, row.maximize,
                                                       stream, at);
        },
        [&](std::int64_t at) {
          advance<R, kStructure, kAround, Scalar, T>(scalars, around, around_scalars, row.maximize,
                                                     stream, at);
        });
  }
}

template <class R, int kStructure, class T>
void step(const Row& row, const Around& around, const Run* run, std::int64_t runs) {
  if (around.before() || around.after()) {
    step_runs<R, kStructure, T, true>(row, around, run, runs);
  } else {
    step_runs<R, kStructure, T, false>(row, around, run, runs);
  }
}

// Sets each element of the first stream to f(lanes, element, that of another stream).
template <class T, class F>
FASTSGD_LANE void set_runs(const Around& around, const Run* run, std::int64_t runs, int of, F f) {
  using Scalar = typename Compute<T>::Scalar;
  using Register = typename RegisterOf<Scalar>::type;
  const auto scalars = lanes_of<Scalar>(around);
  const auto wide = wide_lanes_of<Register>(scalars);
  for (const Run* end = run + runs; run != end; ++run) {
    T* to = reinterpret_cast<T*>(run->stream[0]);
    const T* from = reinterpret_cast<const T*>(run->stream[of]);
    const auto set = [&](const auto& lanes, std::int64_t at) {
      using L = decltype(lanes.grad_scale + lanes.weight);
      store(to + at, f(lanes, load<L>(to + at), load<L>(from + at)));
    };
    go_over<Register, Scalar>(
        run->count, [&](std::int64_t at) { set(wide, at); },
        [&](std::int64_t at) { set(scalars, at); });
  }
}

// Averages of parameters that are not stepped.
template <class T>
void average(const Row&, const Around& around, const Run* run, std::int64_t runs) {
  set_runs<T>(around, run, runs, 1, [&](const auto& lanes, auto average, auto p) {
    return lanes.average(around, average, p);
  });
}

template <class T>
void scale(const Row&, const Around& around, const Run* run, std::int64_t runs) {
  set_runs<T>(around, run, runs, 0,
              [&](const auto& lanes, auto x, auto) { return lanes.clip(around, x); });
}

template <class T>
void exchange(const Row&, const Around&, const Run* run, std::int64_t runs) {
  for (const Run* end = run + runs; run != end; ++run) {
    T* a = reinterpret_cast<T*>(run->stream[0]);
    T* b = reinterpret_cast<T*>(run->stream[1]);
    for (std::int64_t i = 0; i < run->count; ++i) {
      const T kept = a[i];
      a[i] = b[i];
      b[i] = kept;
    }
  }
}

// --- the table ----------------------------------------------------------------------------------

constexpr KernelTable table(const char* instruction_set) {
  KernelTable table{instruction_set, {}, {}, {}};
  each_storage([&]<class T>(int type) {
    table.by_number[kAverage + type] = average<T>;
    table.by_number[kScale + type] = scale<T>;
    table.by_number[kExchange + type] = exchange<T>;
    table.squares[type] = squares<T>;
    table.magnitude[type] = magnitude<T>;
  });
  fill_kernels(
      table.by_number,
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
