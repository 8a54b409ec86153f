#include "extras.h"

#include <torch/csrc/Exceptions.h>

#include <cmath>

#include "pycall.h"
#include "pytensor.h"

namespace fastsgd {
namespace {

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

}  // namespace

const Extras& ExtrasReader::read(PyObject* attributes) {
  PyObject* dict = extras_.ask(attributes);
  if (dict == nullptr || !PyDict_CheckExact(dict)) return none_;
  const std::uint64_t version = version_of(dict);
  if (version == 0 || version != version_) {
    version_ = 0;
    read_dict(dict);
    version_ = version;
  }
  return seen_;
}

void ExtrasReader::read_dict(PyObject* dict) {
  seen_ = {};
  if (PyObject* max_norm = max_norm_.optional_in(dict)) {
    seen_.clips = true;
    seen_.max_norm = number(max_norm);
  }
  if (PyObject* order = order_.optional_in(dict)) {
    seen_.order = std::isinf(number(order)) ? Order::kInfinity : Order::kTwo;
  }
  if (PyObject* bound = bound_.optional_in(dict)) {
    seen_.bounds = true;
    seen_.bound = number(bound);
  }
  if (PyObject* decay = decay_.optional_in(dict)) {
    seen_.averages = true;
    if (PyFloat_Check(decay)) {
      seen_.decay = number(decay);
    } else {
      seen_.schedule = decay;
    }
  }
  seen_.wide = wide_.optional_in(dict) != nullptr;
  if (PyObject* raises = raises_.optional_in(dict)) seen_.raises = is_true(raises);
  if (PyObject* skips = skips_.optional_in(dict)) seen_.skips = is_true(skips);
  seen_.swapped = swapped_.optional_in(dict) != nullptr;
  if (PyObject* clear = clear_.optional_in(dict)) {
    if (PyUnicode_Check(clear)) {
      seen_.clear = Extras::Clear::kToZero;
    } else if (is_true(clear)) {
      seen_.clear = Extras::Clear::kToNone;
    }
  }
  seen_.any = seen_.clips || seen_.bounds || seen_.averages || seen_.raises || seen_.skips ||
              seen_.clear != Extras::Clear::kKeep;
}

void ExtrasReader::refuse_in(PyObject* group) {
  const DictKey* const options[] = {&max_norm_, &order_, &raises_, &bound_,
                                    &skips_,    &decay_, &wide_,   &clear_};
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(group, &position, &key, &value)) {
    for (const DictKey* option : options) {
      if (!option->is(key)) continue;
      static auto& raise = *new PyCall("fastsgd._extras", "raise_in_group");
      raise(option->name());
    }
  }
}

Averaged ExtrasReader::averaged(PyObject* attributes) {
  PyObject* count = averaged_.optional_in(attributes);
  if (count == nullptr) return {};
  if (any_tensor(count)) return {0, tensor_of(count)};
  const std::int64_t value = PyLong_AsLongLong(count);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return {value, {}};
}

void ExtrasReader::keep(PyObject* attributes, const Averaged& averaged) {
  const Ref count =
      Ref::steal(checked(averaged.there.defined() ? THPVariable_Wrap(averaged.there)
                                                  : PyLong_FromLongLong(averaged.count)));
  if (PyDict_SetItem(attributes, averaged_.name(), count.get()) != 0) throw python_error();
}

double decay_of(PyObject* schedule, std::int64_t number_of_average) {
  static auto& check = *new PyCall("fastsgd._extras", "checked_decay");
  const Ref number_object = Ref::steal(checked(PyLong_FromLongLong(number_of_average)));
  const Ref decay =
      Ref::steal(checked(PyObject_CallFunctionObjArgs(schedule, number_object.get(), nullptr)));
  return number(check(decay.get()).get());
}

}  // namespace fastsgd
