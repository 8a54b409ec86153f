// What an optimizer does in a step besides stock's: clip, skip, average, clear. Python has checked
// it, and keeps it in a dict that is there only if anything was ever asked for.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <cstdint>
#include <optional>

#include "norm.h"
#include "pydict.h"

namespace fastsgd {

struct Extras {
  enum class Clear : std::uint8_t { kKeep, kToNone, kToZero };

  bool any = false;
  // Clipping. The factor is here if Python has found it, and no norm is to be computed.
  bool clips = false;
  double max_norm = 0;
  Order order = Order::kTwo;
  bool has_factor = false;
  double factor = 1;
  bool raises = false, skips = false;  // where a gradient is not finite
  bool bounds = false;
  double bound = 0;
  // Averages.
  bool averages = false;
  double decay = 0;
  PyObject* schedule = nullptr;  // asked for the decay, if there is one; borrowed from the dict
  bool wide = false;             // float32 for parameters of 16 bits
  Clear clear = Clear::kKeep;
  bool swapped = false;  // the parameters hold their averages just now

  bool measures() const { return (clips || raises || skips) && !has_factor; }

  // The same for a part of a step of which all but this has been seen to.
  Extras with(double known_factor, std::optional<double> known_decay) const {
    Extras part;
    part.any = true;
    part.has_factor = true;
    part.factor = known_factor;
    part.bounds = bounds;
    part.bound = bound;
    part.averages = known_decay.has_value();
    part.decay = known_decay.value_or(0);
    part.wide = wide;
    return part;
  }
};

// How many averages there were. A device counts by itself, as it may skip a step, or repeat one.
struct Averaged {
  std::int64_t count = 0;
  at::Tensor there;  // the count, where a device has it
};

class ExtrasReader {
 public:
  // As they are now, good until the next is read.
  const Extras& read(PyObject* attributes);

  // Throws where a group has one, which is the optimizer's.
  void refuse_in(PyObject* group);

  // How many averages there were, as the optimizer has it; and what it is to have.
  Averaged averaged(PyObject* attributes);
  void keep(PyObject* attributes, const Averaged& averaged);

 private:
  void read_dict(PyObject* dict);

  DictKey extras_{"_extras"}, averaged_{"_ema_steps"}, max_norm_{"max_grad_norm"},
      order_{"norm_type"}, raises_{"error_if_nonfinite"}, bound_{"clip_grad_value"},
      skips_{"skip_nonfinite"}, decay_{"ema_decay"}, wide_{"ema_dtype"}, clear_{"clear_grads"},
      swapped_{"swapped"};
  Extras none_, seen_;
  std::uint64_t version_ = 0;
};

// The decay for an average, the `number`th, by a schedule, which the caller keeps alive. Runs
// Python code.
double decay_of(PyObject* schedule, std::int64_t number);

}  // namespace fastsgd
