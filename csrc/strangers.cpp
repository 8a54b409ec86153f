#include "strangers.h"

#include <algorithm>

#include "pytensor.h"
#include "shards.h"

namespace fastsgd {

void Strangers::answer(PyObject* groups) {
  asked_in_step_ = true;
  answers_.clear();
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
    const Ref dict = Ref::borrow(PyList_GET_ITEM(groups, g));
    if (!exact_dict(dict.get())) return;
    const Ref params = Ref::borrow(params_.needed_in(dict.get()));
    if (!PyList_CheckExact(params.get())) return;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.get()); ++i) {
      if (exact_tensor(PyList_GET_ITEM(params.get(), i))) continue;
      Ref param = Ref::borrow(PyList_GET_ITEM(params.get(), i));
      LocalShards::learn(param.get());
      if (LocalShards::is_distributed(param.get())) continue;
      const Ref grad = Ref::steal(checked(PyObject_GetAttrString(param.get(), "grad")));
      answers_.emplace_back(std::move(param), grad.get() != Py_None);
    }
  }
}

bool Strangers::has_grad(PyObject* param) {
  met_ = true;
  const auto is = [&](const auto& answer) { return answer.first.get() == param; };
  auto answer = answers_.begin() + static_cast<std::ptrdiff_t>(next_);
  if (answer == answers_.end() || !is(*answer)) {
    answer = std::find_if(answers_.begin(), answers_.end(), is);
    if (answer == answers_.end()) return true;
  }
  next_ = static_cast<std::size_t>(answer - answers_.begin()) + 1;
  return answer->second;
}

}  // namespace fastsgd
