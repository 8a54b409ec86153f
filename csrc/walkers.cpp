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

// Whether a class derived from that which names the rule has another `_init_group`, by which
// stock's step gathers the parameters of a group.
bool gathers_itself(PyTypeObject* type) {
  PyObject* classes = type->tp_mro;
  PyObject* gathers = nullptr;  // of the first class in the order in which attributes are found
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); ++i) {
    auto* each = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(classes, i));
    if (each->tp_dict == nullptr) continue;  // built in
    const auto own = [&](const char* name) { return PyDict_GetItemString(each->tp_dict, name); };
    if (own("_rule") != nullptr) return gathers != nullptr;
    if (gathers == nullptr) gathers = own("_init_group");
  }
  return false;
}

}  // namespace

// What an optimizer's class says: again whenever it is another, or has changed.
void Walkers::read_class(PyObject* optimizer) {
  PyTypeObject* type = Py_TYPE(optimizer);
  if (type == type_ && type->tp_version_tag == version_ && version_ != 0) return;
  const Ref name = Ref::steal(checked(PyObject_GetAttrString(optimizer, "_rule")));
  const char* text = PyUnicode_AsUTF8(name.get());
  if (text == nullptr) throw python_error();
  const int rule = find_rule(text);
  TORCH_CHECK_VALUE(rule >= 0, "this build of fastsgd has no rule called '", text,
                    "': build it again, if the class is newer than the build.");
  Foreign foreign = gathers_itself(type) ? Foreign::kGathering : Foreign::kNothing;
  for (const char* own : {"param_groups", "state", "defaults"}) {
    if (has_attribute(reinterpret_cast<PyObject*>(type), own)) foreign = Foreign::kAttributes;
  }
  rule_ = rule;
  foreign_ = foreign;
  type_ = type;
  version_ = type->tp_version_tag;
}

Walker& Walkers::idle(PyObject* optimizer) {
  read_class(optimizer);
  for (const auto& walker : all_) {
    if (!walker->busy && walker->is_of(rule_, foreign_)) return *walker;
  }
  return *all_.emplace_back(std::make_unique<Walker>(rule_, foreign_, findings_));
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
