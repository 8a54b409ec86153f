#include "rules/table.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "rules/all.h"

namespace fastsgd {
namespace {

template <class R>
double write_scalars(const Number* hypers, const Moment& moment, Row& row) {
  const auto scalars = R::scalars(hypers, moment);
  static_assert(sizeof(scalars) <= kScalarBytes,
                "a rule has more scalars than rule.h has room for");
  static_assert(std::is_trivially_copyable_v<decltype(scalars)>);
  std::memcpy(row.scalars, &scalars, sizeof(scalars));
  double greatest = 0;
  scalars.each([&](double x) {
    greatest = std::max(greatest, finite_magnitude(x));
    return x;
  });
  return greatest;
}

template <class R>
constexpr Structure structure_of(int structure) {
  Structure of;
  for (int i = 0; i < static_cast<int>(std::size(R::kStates)); ++i) {
    if ((R::states(structure) >> i & 1u) == 0) continue;
    of.number[of.count] = i;
    of.state[of.count++] = R::kStates[i];
  }
  return of;
}

constexpr Structure averaged(Structure of, int number) {
  of.average = of.count;
  of.number[of.count] = number;
  of.state[of.count++] = kAverageState;
  return of;
}

template <class R>
constexpr Rule describe() {
  static_assert(std::size(R::kHypers) <= kMaxHypers, "more hyper-parameters than in rule.h");
  static_assert(std::size(R::kStates) < kMaxStates, "more states, with an average, than in rule.h");
  Rule rule = {.name = R::kName,
               .hypers = R::kHypers,
               .hyper_count = static_cast<int>(std::size(R::kHypers)),
               .states = R::kStates,
               .state_count = static_cast<int>(std::size(R::kStates)),
               .structure = R::structure,
               .adds_param = R::adds_param,
               .scalars = write_scalars<R>};
  if constexpr (requires { R::kCounts; }) rule.counts = R::kCounts;
  if constexpr (requires { R::kNewState; }) rule.new_state = R::kNewState;
  if constexpr (requires { R::kFill; }) rule.fill = R::kFill;
  if constexpr (requires { R::kSparseError; }) rule.sparse_error = R::kSparseError;
  for (int i = 0; i < R::kStructures; ++i) {
    rule.structures[i] = structure_of<R>(i);
    rule.structures[kMaxStructures + i] = averaged(rule.structures[i], rule.state_count);
  }
  return rule;
}

template <class... R>
const Rule* table(List<R...>) {
  static constexpr Rule rules[] = {describe<R>()...};
  return rules;
}

}  // namespace

int find_rule(const char* name) {
  for (int i = 0; i < Rules::kSize; ++i) {
    if (std::strcmp(rule_at(i).name, name) == 0) return i;
  }
  return -1;
}

const Rule& rule_at(int number) { return table(Rules{})[number]; }

}  // namespace fastsgd
