// What a parameter group, and a gradient scaler, ask of a step.
#pragma once

#include <Python.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "alias.h"
#include "prefetch.h"
#include "pydict.h"
#include "rule.h"
#include "tensors.h"

namespace fastsgd {

static_assert(sizeof(Number) == sizeof(double) + sizeof(std::int64_t), "compared byte by byte");

// The options of one group as they are at this step.
struct GroupOptions {
  PyObject* params = nullptr;  // as the group holds them
  Number hypers[kMaxHypers];
  bool maximize = false;
  bool readable = false;  // false: an option only stock can interpret
  bool promotes = false;  // a float64 tensor, with which parameters of no dimension are promoted
  int structure = 0;
  std::optional<c10::Device>
      device;  // where values are tensors, if not here: only kernels see them

  // Whether they are the same to the bit, and so make the same scalars; of whatever parameters.
  friend bool operator==(const GroupOptions& a, const GroupOptions& b) {
    return std::memcmp(a.hypers, b.hypers, sizeof(a.hypers)) == 0 && a.maximize == b.maximize &&
           a.readable == b.readable && a.promotes == b.promotes && a.structure == b.structure;
  }
  // Whether parameters can be taken without a closer look at the options.
  bool usual() const { return readable && !promotes && !device; }
};

// What a GradScaler leaves on an optimizer that does its own unscaling.
struct Scaling {
  double scale = 1;
  bool unscale = false;
  bool skip = false;  // it found an inf or a NaN
  bool readable = false;
  // Where they are, if that is another device than the CPU; null where they are not.
  const float *scale_at = nullptr, *found_inf_at = nullptr;
  std::optional<c10::Device> device;  // of theirs

  bool there_is_any() const { return unscale || skip || device; }
};

// Reads options. What it keeps of a group is good for as long as the group's version is the same,
// and each value for as long as the object is.
class OptionReader {
 public:
  explicit OptionReader(const Rule& rule);

  // Forgets what the last walk has read.
  void begin() { tensors_.clear(); }
  // The memory of the tensors that options were read from since.
  const std::vector<Range>& tensors() const { return tensors_; }

  // Fetches what read() will want of a group.
  FASTSGD_PREFETCHING void fetch(std::size_t number) const {
    if (number >= seen_.size()) return;
    const GroupSeen& seen = seen_[number];
    prefetch<sizeof(PyDictObject)>(seen.group);
    prefetch<sizeof(PyListObject)>(seen.options.params);
    prefetch(seen.items);
  }
  // Whether a group is as it was when it was read.
  bool knows(PyObject* group, std::size_t number) const {
    const std::uint64_t version = version_of(group);
    return version != 0 && number < seen_.size() && seen_[number].version == version;
  }
  // The options of a group; good until the next is read.
  const GroupOptions& read(PyObject* group, std::size_t number);
  Scaling read_scaling(PyObject* attributes);

  // Refuses options that stock's arithmetic would refuse halfway through the step of a parameter.
  void refuse(Place place, PyObject* group, PyObject* param);

 private:
  // A hyper-parameter: its value belongs to the immutable object that was seen.
  struct Seen {
    Ref object;
    Number number;
  };
  struct GroupSeen {
    const void *group = nullptr, *items = nullptr;  // its dict, and what its list points to
    std::uint64_t version = 0;  // of the dict; 0 where a value is in an object that can change
    GroupOptions options;
    std::vector<Seen> hypers;
  };
  enum class Read { kConstant, kMutable, kNot };
  Read read_hyper(PyObject* object, const Hyper& hyper, Seen& seen, Number& number);
  Read read_number(PyObject* object, Hyper::Kind kind, Seen& seen, Number& number);

  const Rule& rule_;
  DictKey params_{"params"}, maximize_{"maximize"}, differentiable_{"differentiable"},
      grad_scale_{"grad_scale"}, found_inf_{"found_inf"};
  std::vector<DictKey> hyper_keys_;
  std::vector<GroupSeen> seen_;
  std::optional<c10::Device> device_;  // of the group that is read
  std::vector<Range> tensors_;
};

// The truth of an object that has no code of its own for it; false is returned for any other
// object.
bool read_flag(PyObject* object, bool& value);

}  // namespace fastsgd
