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

// What a class has itself by a name; null if nothing, or if it is built in.
PyObject* own(PyObject* cls, const DictKey& name) {
  PyObject* dict = reinterpret_cast<PyTypeObject*>(cls)->tp_dict;
  return dict == nullptr ? nullptr : name.ask(dict);
}

// The first that any class has, from the `begin`th on in an order in which attributes are found.
PyObject* first_own(PyObject* classes, const DictKey& name, Py_ssize_t begin) {
  for (Py_ssize_t i = begin; i < PyTuple_GET_SIZE(classes); ++i) {
    if (PyObject* found = own(PyTuple_GET_ITEM(classes, i), name)) return found;
  }
  return nullptr;
}

// Whether a class has another `_init_group`, by which stock's step gathers the parameters of a
// group, than the one that its rule is for: that of the bases of the class that names the rule.
bool gathers_itself(PyTypeObject* type) {
  static const DictKey& rule = *new DictKey("_rule");
  static const DictKey& init_group = *new DictKey("_init_group");
  PyObject* classes = type->tp_mro;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(classes); ++i) {
    PyObject* each = PyTuple_GET_ITEM(classes, i);
    if (own(each, rule) == nullptr) continue;
    PyObject* bases = reinterpret_cast<PyTypeObject*>(each)->tp_mro;
    return first_own(classes, init_group, 0) != first_own(bases, init_group, 1);
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
