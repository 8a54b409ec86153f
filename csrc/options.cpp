#include "options.h"

#include "pytensor.h"

namespace fastsgd {
namespace {

// A one-element floating point CPU tensor's value; false for any other object.
bool read_scalar_tensor(PyObject* object, double& value) {
  if (!exact_tensor(object)) return false;
  const at::Tensor& tensor = tensor_of(object);
  if (!tensor.device().is_cpu() || tensor.layout() != at::kStrided || tensor.numel() != 1 ||
      tensor.requires_grad() || !tensor.is_floating_point() || tensor.is_neg() ||
      tensor._is_zerotensor()) {
    return false;
  }
  switch (tensor.scalar_type()) {
    case at::kFloat:
      value = *tensor.const_data_ptr<float>();
      break;
    case at::kDouble:
      value = *tensor.const_data_ptr<double>();
      break;
    default:
      value = tensor.item<double>();
  }
  return true;
}

}  // namespace

bool read_flag(PyObject* object, bool& value) {
  if (!PyBool_Check(object) && object != Py_None && !PyLong_CheckExact(object) &&
      !PyFloat_CheckExact(object)) {
    return false;
  }
  value = PyObject_IsTrue(object) != 0;
  return true;
}

OptionReader::OptionReader(const Rule& rule) : rule_(rule) {
  for (int i = 0; i < rule.hyper_count; ++i) hyper_keys_.emplace_back(rule.hypers[i].name);
}

OptionReader::Read OptionReader::read_number(PyObject* object, Hyper::Kind kind, Seen& seen,
                                             double& value) {
  if (object == seen.object.get()) {
    value = seen.value;
    return Read::kConstant;
  }
  if (kind == Hyper::kFlag) {
    bool flag;
    if (!read_flag(object, flag)) return Read::kNot;
    value = flag ? 1 : 0;
  } else if (PyFloat_Check(object)) {
    value = PyFloat_AS_DOUBLE(object);
    if (!PyFloat_CheckExact(object)) return Read::kMutable;  // a subclass may hold on to anything
  } else if (PyLong_CheckExact(object)) {
    value = PyLong_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) throw python_error();
  } else {
    const bool reads = kind == Hyper::kNumberOrTensor && read_scalar_tensor(object, value);
    return reads ? Read::kMutable : Read::kNot;
  }
  seen.object = Ref::borrow(object);  // immutable, so the same object is the same value
  seen.value = value;
  return Read::kConstant;
}

const GroupOptions& OptionReader::read(PyObject* group, std::size_t number) {
  if (number >= seen_.size()) seen_.resize(number + 1);
  GroupSeen& seen = seen_[number];
  GroupOptions& options = seen.options;
  const std::uint64_t version = version_of(group);
  if (version != 0 && version == seen.version) return options;
  seen.version = 0;
  options = {};
  seen.hypers.resize(hyper_keys_.size());
  options.readable = read_flag(maximize_.needed_in(group), options.maximize);
  bool constant = true;
  for (std::size_t i = 0; i < hyper_keys_.size(); ++i) {
    const Read read = read_number(hyper_keys_[i].needed_in(group), rule_.hypers[i].kind,
                                  seen.hypers[i], options.hypers[i]);
    options.readable &= read != Read::kNot;
    constant &= read == Read::kConstant;
  }
  if (!options.readable) return options;
  options.structure = rule_.structure(options.hypers);
  options.states = rule_.state_count(options.structure);
  if (constant) seen.version = version;
  return options;
}

Scaling OptionReader::read_scaling(PyObject* attributes) {
  Scaling scaling;
  if (PyObject* found_inf = found_inf_.optional_in(attributes)) {
    double found;
    if (!read_scalar_tensor(found_inf, found)) return scaling;
    scaling.skip = found != 0;
  }
  if (PyObject* grad_scale = grad_scale_.optional_in(attributes)) {
    if (!read_scalar_tensor(grad_scale, scaling.scale)) return scaling;
    scaling.unscale = true;
  }
  scaling.readable = true;
  return scaling;
}

void OptionReader::refuse(Place place, PyObject* group, PyObject* param) {
  for (std::size_t i = 0; i < hyper_keys_.size(); ++i) {
    if (rule_.hypers[i].kind == Hyper::kFlag) continue;
    const char* name = rule_.hypers[i].name;
    PyObject* option = hyper_keys_[i].needed_in(group);
    if (THPVariable_Check(option)) {
      TORCH_CHECK_VALUE(tensor_of(option).numel() == 1, "param_groups[", place.group, "]['", name,
                        "']: Tensor ", name, " must be 1-element");
    } else {
      TORCH_CHECK_TYPE(PyNumber_Check(option), "param_groups[", place.group, "]['", name,
                       "'] must be a number, not ", Py_TYPE(option)->tp_name);
    }
    TORCH_CHECK(!PyComplex_Check(option) || tensor_of(param).is_complex(), at_place(place),
                ": For non-complex input tensors, argument alpha must not be a complex number.");
  }
}

}  // namespace fastsgd
