// What a rule says of itself. A rule header holds four things, each said once: the names of its
// hyper-parameters, the names of its states, the scalars of one step, and the update of one lane.
// It knows nothing of dtypes, threads, layouts, `maximize` or gradient scaling.
#pragma once

#include <cstddef>

#include "number.h"

namespace fastsgd {

// A hyper-parameter: a key of a parameter group, and the values of it that a rule computes with.
struct Hyper {
  enum Kind {
    kNumber,          // a Python int or float
    kNumberOrTensor,  // the same, or a floating point tensor of one element
    kNumberOrScalar,  // the same, or one of no dimension
    kNumberOrSingle,  // the same, or a float32 tensor of one element
    kFlag,            // anything; its truth value counts
  };
  const char* name;
  Kind kind = kNumber;
  int element = -1;  // where the key holds a pair: which of the two
};

// A state of a parameter: a key of its entry in the optimizer's state.
struct State {
  const char* name;
  bool lerped = false;  // stock interpolates towards the gradient, and asks for one dtype of both
};

// How a new state comes to be: stock makes each from some tensor, and states are stock's.
enum class NewState {
  kOfGrad,  // a copy of the gradient, as it is when the rule comes to use it
  kFilled,  // like the parameter, filled with zeros or the rule's kFill
};

// How new states of a parameter come to be.
struct Birth {
  NewState how = NewState::kFilled;
  double fill = 0;
  bool maximize = false;    // the sign of the gradient is turned first
  bool adds_param = false;  // and then a multiple of the parameter is added to it
};

// When in a parameter's life a step is taken.
struct Moment {
  bool first = false;  // the step makes the states; not said to a rule that counts
  double step = 0;     // its number, from 1 on, for a rule that counts

  friend bool operator==(const Moment&, const Moment&) = default;
};

inline constexpr int kMaxHypers = 12;
inline constexpr int kMaxStates = 4;
inline constexpr int kMaxStructures = 4;
inline constexpr std::size_t kScalarBytes = 96;

// The states of a rule are a set, its members numbered by their place in kStates.
using StateSet = unsigned;
constexpr int size_of(StateSet set) {
  return set == 0 ? 0 : static_cast<int>(set & 1) + size_of(set >> 1);
}

// The scalars of one step as the host computed them (a rule's Scalars<double>). Parameters at the
// same step whose hyper-parameters are the same share a row.
struct Row {
  alignas(double) unsigned char scalars[kScalarBytes];
  bool maximize = false;  // the sign of the gradient is turned before the rule sees it
};

// What one structure of a rule keeps for a parameter, in the order of the kernel's streams. Last
// may be the parameter's average, which is no state of the rule's.
struct Structure {
  int count = 0;
  int number[kMaxStates] = {};  // in the rule's states
  State state[kMaxStates] = {};
  int average = -1;                                         // its place, if there is one
  const char* before_states[2] = {"its data", "its grad"};  // those streams, for messages
};
inline constexpr State kAverageState = {"ema"};

// A rule as the host sees it, when the type is no longer known.
struct Rule {
  const char* name;
  const Hyper* hypers;
  int hyper_count;
  const State* states;
  int state_count;
  bool counts = false;         // it has a state "step" besides, which counts a parameter's steps
  const char* fill = nullptr;  // the default that new states are filled with; null for zero
  const char* sparse_error = nullptr;  // stock's, for a sparse gradient; null where it takes them
  NewState new_state = NewState::kFilled;
  Structure structures[2 * kMaxStructures] = {};  // those with an average after those without
  // The structure that these hyper-parameters ask for.
  int (*structure)(const Number* hypers);
  // Whether they add a multiple of the parameter to the gradient, which may be of another dtype.
  bool (*adds_param)(const Number* hypers);
  // Computes the scalars of a step into `row`, and returns the greatest magnitude among those that
  // are finite: some of stock's operators have an error where a dtype cannot hold one.
  double (*scalars)(const Number* hypers, const Moment& moment, Row& row);
};

}  // namespace fastsgd
