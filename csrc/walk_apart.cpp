// The parameters of a step that share memory with others of it. Duplicates and overlaps run in
// order, but where stock must take a part, or one parameter is to get its first state twice, or
// count two steps, or where an option is a tensor (which may lie in a parameter), or where anything
// is done around the rule (averages or zeros are written too), only stock knows the order. It then
// takes those parameters, and the kernels the others, which meet nothing.
#include <algorithm>

#include "pytensor.h"
#include "walk.h"

namespace fastsgd {
namespace {

using Tensors = std::vector<const c10::TensorImpl*>;

// In ascending order, each once.
void make_set(Tensors& tensors) {
  std::sort(tensors.begin(), tensors.end());
  tensors.erase(std::unique(tensors.begin(), tensors.end()), tensors.end());
}

}  // namespace

// Whether what is planned meets itself where order counts, or what stock is to step.
bool Walker::memory_meets() {
  const bool only_stock_knows = !routes_.empty() || states_.creates() || rule_.counts ||
                                !options_.tensors().empty() || extras_->any;
  works_ = devices_.needed();
  plan_.note_scalars(options_.tensors());
  for (cuda::DeviceWork* work : works_) work->plan.note_scalars(options_.tensors());
  if ((plan_.ordered() && only_stock_knows) || (!left_.empty() && plan_.meets(left_))) return true;
  return std::any_of(works_.begin(), works_.end(), [&](cuda::DeviceWork* work) {
    return work->plan.ordered() || (!left_.empty() && work->plan.meets(left_));  // in no order
  });
}

// Sets the parameters apart that meet others, which the walk has checked: stock, which steps them,
// will raise in the middle of none. False where something else meets.
bool Walker::set_apart(PyObject* groups) {
  Tensors meeting, found;
  bool known = plan_.find_meeting(left_, meeting);
  for (cuda::DeviceWork* work : works_) known &= work->plan.find_meeting(left_, meeting);
  if (!known || meeting.empty()) return false;
  make_set(meeting);
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    PyObject* params = params_.needed_in(PyList_GET_ITEM(groups, g));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      PyObject* object = PyList_GET_ITEM(params, i);
      if (!exact_tensor(object)) continue;
      const c10::TensorImpl* param = impl_of(object);
      if (!std::binary_search(meeting.begin(), meeting.end(), param)) continue;
      apart_.push_back({g, i});
      found.push_back(param);
    }
  }
  make_set(found);
  if (found != meeting) apart_.clear();
  return found == meeting;
}

bool Walker::is_apart(Place place) const {
  return std::binary_search(apart_.begin(), apart_.end(), place, [](Place a, Place b) {
    return a.group != b.group ? a.group < b.group : a.index < b.index;
  });
}

}  // namespace fastsgd
