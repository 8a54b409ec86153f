#include "walkers.h"

#include <c10/util/Exception.h>
#include <torch/csrc/Exceptions.h>

#include "pydict.h"
#include "pytensor.h"
#include "rules/table.h"

namespace fastsgd {
namespace {

// Whether an object has an attribute. Throws what asking raises but for its absence.
bool has_attribute(PyObject* object, const char* name) {
  const Ref found = Ref::steal(PyObject_GetAttrString(object, name));
  if (!found && !PyErr_ExceptionMatches(PyExc_AttributeError)) throw python_error();
  PyErr_Clear();
  return static_cast<bool>(found);
}

std::unique_ptr<Walker> new_walker(PyObject* optimizer, Findings& findings) {
  const Ref name = Ref::steal(checked(PyObject_GetAttrString(optimizer, "_rule")));
  const char* text = PyUnicode_AsUTF8(name.get());
  if (text == nullptr) throw python_error();
  const int rule = find_rule(text);
  TORCH_CHECK_VALUE(rule >= 0, "this build of fastsgd has no rule called '", text,
                    "': build it again, if the class is newer than the build.");
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(optimizer));
  bool foreign = false;
  for (const char* own : {"param_groups", "state", "defaults"}) {
    foreign |= has_attribute(type, own);
  }
  return std::make_unique<Walker>(rule, foreign, findings);
}

}  // namespace

Walker& Walkers::idle(PyObject* optimizer) {
  for (const auto& walker : all_) {
    if (!walker->busy) return *walker;
  }
  return *all_.emplace_back(new_walker(optimizer, findings_));
}

std::int64_t Walkers::skipped_steps() const {
  std::int64_t skipped = findings_.skipped;
  for (std::size_t i = 0; i < all_.size(); ++i) skipped += all_[i]->skipped_there();
  return skipped;
}

void Walkers::note(const at::Tensor& grad_norm, bool skipped) {
  findings_.found(grad_norm);
  findings_.skipped += skipped;
}

}  // namespace fastsgd
