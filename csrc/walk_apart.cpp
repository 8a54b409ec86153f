// The parameters of a step that share memory with others of it. Duplicates and overlaps run in
// order, but where stock must take a part, or one parameter is to get its first state twice, or
// count two steps, or where an option is a tensor (which may lie in a parameter), only stock knows
// the order. It then takes those parameters, and the kernels the others, which meet nothing.
#include <algorithm>

#include "pytensor.h"
#include "walk.h"

namespace fastsgd {
namespace {

// So many steps stock keeps them: looking again costs a walk.
constexpr int kApartFor = 100;

const void* memory_of(const c10::TensorImpl& tensor) {
  return tensor.has_storage() ? tensor.storage().data() : nullptr;
}

// The parameter that stands at a place; null if there is none.
const c10::TensorImpl* param_at(PyObject* groups, DictKey& params, Place place) {
  if (place.group >= PyList_GET_SIZE(groups)) return nullptr;
  PyObject* group = PyList_GET_ITEM(groups, place.group);
  PyObject* list = exact_dict(group) ? params.optional_in(group) : nullptr;
  if (list == nullptr || !PyList_CheckExact(list) || place.index >= PyList_GET_SIZE(list)) {
    return nullptr;
  }
  PyObject* param = PyList_GET_ITEM(list, place.index);
  return exact_tensor(param) ? impl_of(param) : nullptr;
}

}  // namespace

// Before a step: forgets the parameters that are set apart, if they are not where they were.
void Walker::forget_apart(PyObject* groups) {
  if (apart_.empty()) return;
  const bool all = std::all_of(apart_.begin(), apart_.end(), [&](const Apart& apart) {
    const c10::TensorImpl* param = param_at(groups, params_, apart.place);
    return param == apart.param && memory_of(*param) == apart.memory;
  });
  if (!all || apart_once_ || ++apart_for_ > kApartFor) apart_.clear();
}

// Whether what is planned meets itself where order counts, or what stock is to step.
bool Walker::memory_meets() {
  const bool needs_order = !routes_.empty() || states_.creates() || rule_.counts ||
                           !options_.tensors().empty() || extras_->any;
  plan_.note_scalars(options_.tensors());
  works_ = devices_.needed();
  if ((plan_.ordered() && needs_order) || (!left_.empty() && plan_.meets(left_))) return true;
  return std::any_of(works_.begin(), works_.end(), [&](cuda::DeviceWork* work) {
    work->plan.note_scalars(options_.tensors());
    return work->plan.ordered() || (!left_.empty() && work->plan.meets(left_));  // in no order
  });
}

// Sets the parameters apart that meet others. False where something else does.
bool Walker::set_apart(PyObject* groups) {
  std::vector<const c10::TensorImpl*> meeting;
  bool known = plan_.find_meeting(left_, meeting);
  for (cuda::DeviceWork* work : works_) known &= work->plan.find_meeting(left_, meeting);
  if (!known || meeting.empty()) return false;
  std::sort(meeting.begin(), meeting.end());
  meeting.erase(std::unique(meeting.begin(), meeting.end()), meeting.end());
  apart_.clear();
  apart_for_ = 0;
  // Once they have states, order is all that counts.
  apart_once_ = states_.creates() && !rule_.counts && !extras_->any && routes_.empty() &&
                options_.tensors().empty() && works_.empty();
  std::vector<const c10::TensorImpl*> found;
  for (Place place{0, 0}; place.group < PyList_GET_SIZE(groups); ++place.group) {
    PyObject* params = params_.in(PyList_GET_ITEM(groups, place.group));
    for (place.index = 0; place.index < PyList_GET_SIZE(params); ++place.index) {
      const c10::TensorImpl* param = param_at(groups, params_, place);
      if (param == nullptr || !std::binary_search(meeting.begin(), meeting.end(), param)) continue;
      apart_.push_back({place, param, memory_of(*param)});
      found.push_back(param);
    }
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  if (found != meeting) apart_.clear();
  return found == meeting;
}

bool Walker::is_apart(Place place) const {
  const auto before = [](const Apart& apart, Place other) {
    const Place& own = apart.place;
    return own.group != other.group ? own.group < other.group : own.index < other.index;
  };
  const auto at = std::lower_bound(apart_.begin(), apart_.end(), place, before);
  return at != apart_.end() && at->place.group == place.group && at->place.index == place.index;
}

}  // namespace fastsgd
