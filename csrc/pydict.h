// Looking keys up in Python dictionaries that hardly change, without hashing.
#pragma once

#include <Python.h>

#include <utility>
#include <vector>

namespace fastsgd {

// An owned reference to a Python object.
class Ref {
 public:
  Ref() = default;
  static Ref steal(PyObject* object) { return Ref(object); }
  static Ref borrow(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

// A key that is looked up at every step. Where it was found the last time is only a hint: the key
// found there is compared, so whatever happened to the dictionary, the answer is true.
class DictKey {
 public:
  explicit DictKey(const char* name) : name_(Ref::steal(PyUnicode_InternFromString(name))) {}
  PyObject* name() const { return name_.get(); }

  // The value, borrowed; null if there is none.
  PyObject* in(PyObject* dict) {
    Py_ssize_t position = position_;
    PyObject *key, *value;
    if (PyDict_Next(dict, &position, &key, &value) && key == name_.get()) return value;
    return search(dict);
  }

 private:
  PyObject* search(PyObject* dict) {
    PyObject *key, *value;
    Py_ssize_t position = 0, before = 0;
    while (PyDict_Next(dict, &position, &key, &value)) {
      if (key == name_.get()) {
        position_ = before;
        return value;
      }
      before = position;
    }
    // Equal but not identical: a key that was unpickled, for one.
    return PyDict_GetItemWithError(dict, name_.get());
  }

  Ref name_;
  Py_ssize_t position_ = 0;
};

// The entries of a dictionary whose keys are compared by identity, as tensors are. Each lookup
// brings a hint of where the key was before; the index is built only when hints fail.
class IdentityMap {
 public:
  void begin(PyObject* dict) {
    dict_ = dict;
    index_.clear();
  }

  // The value for `key`, borrowed; null if there is none. `hint` belongs to the key's owner.
  PyObject* at(PyObject* key, Py_ssize_t& hint) {
    Py_ssize_t position = hint;
    PyObject *found, *value;
    if (PyDict_Next(dict_, &position, &found, &value) && found == key) return value;
    return search(key, hint);
  }

 private:
  PyObject* search(PyObject* key, Py_ssize_t& hint);

  PyObject* dict_ = nullptr;
  std::vector<std::pair<PyObject*, Py_ssize_t>> index_;
};

}  // namespace fastsgd
