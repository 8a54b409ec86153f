#include "pydict.h"

#include <torch/csrc/Exceptions.h>

#include <algorithm>

namespace fastsgd {

PyObject* DictKey::needed_in(PyObject* dict) {
  PyObject* value = in(dict);
  if (value != nullptr) return value;
  PyErr_SetObject(PyExc_KeyError, name());
  throw python_error();
}

PyObject* DictKey::search(PyObject* dict) {
  PyObject *key, *value;
  Py_ssize_t position = 0, before = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    const bool same = key == name_.get();
    if (same || (PyUnicode_Check(key) && PyUnicode_Compare(key, name_.get()) == 0)) {
      position_ = before;
      if (!same) equal_ = Ref::borrow(key);
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
