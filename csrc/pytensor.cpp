#include "pytensor.h"

#include <array>
#include <string>
#include <string_view>

namespace fastsgd {
namespace {

// What a class may define although Tensor does: how its objects are made, shown and copied.
constexpr std::string_view kHarmless =
    " __module__ __qualname__ __doc__ __dict__ __weakref__ __new__ __init__ "
    "__init_subclass__ __repr__ __str__ __format__ __copy__ __deepcopy__ __reduce__ "
    "__reduce_ex__ __getstate__ __setstate__ __slots__ __annotations__ __annotate__ "
    "__annotate_func__ __annotations_cache__ __firstlineno__ __static_attributes__ "
    "__orig_bases__ __parameters__ __class_getitem__ __subclasshook__ ";

bool is_harmless(const std::string& name) {
  return kHarmless.find(' ' + name + ' ') != std::string_view::npos;
}

// Whether a class defines nothing that Parameter has.
bool defines_nothing(PyTypeObject* type) {
  PyObject *name, *value;
  Py_ssize_t position = 0;
  if (type->tp_dict == nullptr) return false;  // no class statement made it
  while (PyDict_Next(type->tp_dict, &position, &name, &value)) {
    const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
      return false;
    }
    if (is_harmless(text)) continue;
    if (_PyType_Lookup(reinterpret_cast<PyTypeObject*>(ParameterClass), name) != nullptr) {
      return false;
    }
  }
  return true;
}

bool changes_nothing(PyTypeObject* type) {
  auto* parameter = reinterpret_cast<PyTypeObject*>(ParameterClass);
  if (parameter == nullptr || PyType_IsSubtype(type, parameter) == 0 ||
      type->tp_getattro != parameter->tp_getattro || type->tp_setattro != parameter->tp_setattro) {
    return false;
  }
  PyObject* mro = type->tp_mro;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(mro); ++i) {
    auto* base = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(mro, i));
    if (base == parameter) return true;
    if (!defines_nothing(base)) return false;
  }
  return false;
}

}  // namespace

// A class has a new version whenever it, or one that it derives from, is changed.
bool is_plain_parameter_class(PyTypeObject* type) {
  struct Known {
    const PyTypeObject* type;
    unsigned int version;
    bool plain;
  };
  static std::array<Known, 8> known{};
  static std::size_t next = 0;
  for (const Known& each : known) {
    if (each.type == type && each.version == type->tp_version_tag) return each.plain;
  }
  const bool plain = changes_nothing(type);
  if (type->tp_version_tag == 0) return plain;  // which is no version
  known[next] = {type, type->tp_version_tag, plain};
  next = (next + 1) % known.size();
  return plain;
}

}  // namespace fastsgd
