// Looking keys up in Python dictionaries that hardly change, without hashing.
#pragma once

#include <Python.h>

#include <cstdint>
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

// A dict or an OrderedDict, as torch makes them; a type of its own may mean something else by its
// items.
inline bool exact_dict(PyObject* object) {
  return PyDict_CheckExact(object) || PyODict_CheckExact(object);
}

// A defaultdict that makes dicts, as torch keeps an optimizer's states in; to be asked once
// learn_dicts() has been called.
bool is_dict_of_dicts(PyObject* object);
void learn_dicts();

// Where objects of a type keep a member that is any object, as one in __slots__; 0 if it has none
// of that name.
Py_ssize_t offset_of(PyTypeObject* type, const char* name);

// What Python before 3.14 calls a dictionary's version: no two dictionaries, and no two states of
// one, have the same (PEP 509). So equal versions mean the same keys and the same values. 0 where
// there is none to be had: a dictionary whose values lie elsewhere can change without it.
inline std::uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030E0000
  const auto* object = reinterpret_cast<PyDictObject*>(dict);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return object->ma_values == nullptr ? object->ma_version_tag : 0;
#pragma GCC diagnostic pop
#else
  (void)dict;
  return 0;
#endif
}

// A string key that is looked up at every step. Where it was found the last time is only a hint:
// the key found there is compared, so whatever happened to the dictionary, the answer is true. But
// for ask() no look-up runs Python code: keys that are no strings are passed over, whatever they
// say they equal.
class DictKey {
 public:
  explicit DictKey(const char* name);
  PyObject* name() const { return name_.get(); }

  // Whether another dictionary's key is this one.
  bool is(PyObject* key) const { return key == name_.get() || equals(key); }

  // The value, borrowed; null if there is none.
  PyObject* in(PyObject* dict) {
    Py_ssize_t position = position_;
    PyObject *key, *value;
    if (PyDict_Next(dict, &position, &key, &value) && (key == name_.get() || key == equal_.get())) {
      return value;
    }
    return search(dict);
  }

  // The value, borrowed; a KeyError is thrown if there is none.
  PyObject* needed_in(PyObject* dict);

  // The value, borrowed; null if there is none or it is None.
  PyObject* optional_in(PyObject* dict) {
    PyObject* value = in(dict);
    return value == Py_None ? nullptr : value;
  }

  // The same by hashing, which is quicker where the key is not expected; but keys of somebody's own
  // class may run Python code.
  PyObject* ask(PyObject* dict) const;

 private:
  PyObject* search(PyObject* dict);
  bool equals(PyObject* key) const;

  Ref name_;
  Py_hash_t hash_;
  Ref equal_;  // the key found the last time, if it is another object: one that was unpickled, say
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
