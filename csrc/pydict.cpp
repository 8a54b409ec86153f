#include "pydict.h"

#include <structmember.h>
#include <torch/csrc/Exceptions.h>

#include <algorithm>

namespace fastsgd {

namespace {

PyTypeObject* default_dict = nullptr;
Py_ssize_t default_factory = 0;

}  // namespace

Py_ssize_t offset_of(PyTypeObject* type, const char* name) {
  const Ref found = Ref::steal(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name));
  PyErr_Clear();
  if (!found || Py_TYPE(found.get()) != &PyMemberDescr_Type) return 0;
  const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found.get())->d_member;
  return member->type == T_OBJECT || member->type == T_OBJECT_EX ? member->offset : 0;
}

void learn_dicts() {
  const Ref module = Ref::steal(PyImport_ImportModule("collections"));
  if (!module) throw python_error();
  PyObject* type = PyObject_GetAttrString(module.get(), "defaultdict");  // kept for good
  if (type == nullptr) throw python_error();
  default_dict = reinterpret_cast<PyTypeObject*>(type);
  default_factory = offset_of(default_dict, "default_factory");
}

bool is_dict_of_dicts(PyObject* object) {
  return Py_TYPE(object) == default_dict && default_factory != 0 &&
         *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + default_factory) ==
             reinterpret_cast<PyObject*>(&PyDict_Type);
}

DictKey::DictKey(const char* name) : name_(Ref::steal(PyUnicode_InternFromString(name))) {
  if (!name_) throw python_error();
  hash_ = PyObject_Hash(name_.get());
}

PyObject* DictKey::needed_in(PyObject* dict) {
  PyObject* value = in(dict);
  if (value != nullptr) return value;
  PyErr_SetObject(PyExc_KeyError, name());
  throw python_error();
}

// Whether a key that is another object is the same string. Strings remember their hashes.
bool DictKey::equals(PyObject* key) const {
  if (!PyUnicode_Check(key)) return false;
  const Py_hash_t hash = reinterpret_cast<PyASCIIObject*>(key)->hash;
  return (hash == hash_ || hash == -1) && PyUnicode_Compare(key, name_.get()) == 0;
}

PyObject* DictKey::ask(PyObject* dict) const {
  PyObject* value = PyDict_GetItemWithError(dict, name_.get());
  if (value == nullptr && PyErr_Occurred()) throw python_error();
  return value == Py_None ? nullptr : value;
}

PyObject* DictKey::search(PyObject* dict) {
  PyObject *key, *value;
  Py_ssize_t position = 0, before = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    const bool same = key == name_.get();
    if (same || equals(key)) {
      position_ = before;
      if (!same && PyUnicode_CheckExact(key)) equal_ = Ref::borrow(key);  // its end runs no code
      return value;
    }
    before = position;
  }
  return nullptr;
}

PyObject* IdentityMap::search(PyObject* key, Py_ssize_t& hint) {
  PyObject *found, *value;
  if (index_.size() != static_cast<std::size_t>(PyDict_Size(dict_))) {
    index_.clear();
    Py_ssize_t position = 0, before = 0;
    while (PyDict_Next(dict_, &position, &found, &value)) {
      index_.emplace_back(found, before);
      before = position;
    }
    std::sort(index_.begin(), index_.end());
  }
  const auto entry = std::lower_bound(index_.begin(), index_.end(), std::pair(key, Py_ssize_t{0}));
  if (entry == index_.end() || entry->first != key) return nullptr;
  Py_ssize_t position = entry->second;
  if (!PyDict_Next(dict_, &position, &found, &value) || found != key) return nullptr;
  hint = entry->second;
  return value;
}

}  // namespace fastsgd
