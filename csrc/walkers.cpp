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

// The place of the first class from `begin` on, in an order in which attributes are found, that has
// this one itself; the end where none has.
Py_ssize_t find_attribute(PyObject* classes, const char* name, Py_ssize_t begin = 0) {
  const Py_ssize_t end = PyTuple_GET_SIZE(classes);
  for (Py_ssize_t i = begin; i < end; ++i) {
    const auto* each = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(classes, i));
    const bool built_in = each->tp_dict == nullptr;
    if (!built_in && PyDict_GetItemString(each->tp_dict, name) != nullptr) return i;
  }
  return end;
}

PyObject* attribute_from(PyObject* classes, const char* name, Py_ssize_t begin) {
  const Py_ssize_t at = find_attribute(classes, name, begin);
  if (at == PyTuple_GET_SIZE(classes)) return nullptr;
  return PyDict_GetItemString(
      reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(classes, at))->tp_dict, name);
}

// Whether a class has another `_init_group`, by which stock's step gathers the parameters of a
// group, than the one that its rule is for: that of the bases of the class that names the rule.
bool gathers_itself(PyTypeObject* type) {
  const Py_ssize_t ruled = find_attribute(type->tp_mro, "_rule");
  if (ruled == PyTuple_GET_SIZE(type->tp_mro)) return false;
  auto* rules = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(type->tp_mro, ruled));
  return attribute_from(type->tp_mro, "_init_group", 0) !=
         attribute_from(rules->tp_mro, "_init_group", 1);
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
