// Rules by name and number, for the code that walks an optimizer.
#pragma once

#include "rule.h"

namespace fastsgd {

// The number of the rule called `name` in the list of rules, or -1.
int find_rule(const char* name);

const Rule& rule_at(int number);

}  // namespace fastsgd
