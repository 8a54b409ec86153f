// What a rule says of itself. A rule header holds four things, each said once: the names of its
// hyper-parameters, the names of its states, the scalars of one step, and the update of one lane.
// It knows nothing of dtypes, threads, layouts, `maximize` or gradient scaling.
#pragma once

#include <cstddef>

namespace fastsgd {

// A hyper-parameter: a key of a parameter group, and the values of it that a rule computes with.
struct Hyper {
  enum Kind {
    kNumber,          // a Python int or float
    kNumberOrTensor,  // the same, or a floating point tensor of one element
    kFlag,            // anything; its truth value counts
  };
  const char* name;
  Kind kind = kNumber;
};

// What a new state is laid out like in memory: stock makes each from some tensor, and states are
// stock's.
enum class StateLike {
  kGrad,          // a copy of the gradient
  kGradAndParam,  // of their sum
};

inline constexpr int kMaxHypers = 12;
inline constexpr int kMaxStates = 4;
inline constexpr int kMaxStructures = 4;
inline constexpr std::size_t kScalarBytes = 96;

// The scalars of one step as the host computed them (a rule's Scalars<double>), and what the engine
// does to a gradient before the rule sees it. Parameters of one group at the same step share a row.
struct Row {
  alignas(double) unsigned char scalars[kScalarBytes];
  double grad_scale = 1;  // of a gradient scaler; the gradient divided by it is written back
  bool unscale = false;
  bool maximize = false;
};

// A rule as the host sees it, when the type is no longer known.
struct Rule {
  const char* name;
  const Hyper* hypers;
  int hyper_count;
  const char* const* states;
  int max_states;
  // The structure that these hyper-parameters ask for, and how many of `states` it has.
  int (*structure)(const double* hypers);
  int (*state_count)(int structure);
  StateLike (*state_like)(const double* hypers);
  // Computes the scalars of a parameter's first or a later step into `row`.
  void (*scalars)(const double* hypers, bool first, Row& row);
};

}  // namespace fastsgd
