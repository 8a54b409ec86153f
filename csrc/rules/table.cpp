#include "rules/table.h"

#include <cstring>
#include <iterator>
#include <type_traits>

#include "rules/all.h"

namespace fastsgd {
namespace {

template <class R>
void write_scalars(const double* hypers, bool first, Row& row) {
  const auto scalars = R::scalars(hypers, first);
  static_assert(sizeof(scalars) <= kScalarBytes && std::is_trivially_copyable_v<decltype(scalars)>);
  std::memcpy(row.scalars, &scalars, sizeof(scalars));
}

template <class R>
constexpr Rule describe() {
  static_assert(std::size(R::kHypers) <= kMaxHypers && std::size(R::kStates) <= kMaxStates);
  return {.name = R::kName,
          .hypers = R::kHypers,
          .hyper_count = static_cast<int>(std::size(R::kHypers)),
          .states = R::kStates,
          .max_states = static_cast<int>(std::size(R::kStates)),
          .structure = R::structure,
          .state_count = R::state_count,
          .state_like = R::state_like,
          .scalars = write_scalars<R>};
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
