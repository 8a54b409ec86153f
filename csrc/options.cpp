#include "options.h"

#include <cstring>

#include "cuda/emulation.h"
#include "pytensor.h"

namespace fastsgd {
namespace {

// A plain floating point tensor of one element; null for any other object.
const at::Tensor* scalar_tensor(PyObject* object) {
  if (!exact_tensor(object)) return nullptr;
  const at::Tensor& tensor = tensor_of(object);
  const bool plain = tensor.layout() == at::kStrided && tensor.numel() == 1 &&
                     !tensor.requires_grad() && tensor.is_floating_point() && !tensor.is_neg() &&
                     !tensor._is_zerotensor();
  return plain ? &tensor : nullptr;
}

bool on_other_device(const at::Tensor& tensor) {
  return tensor.is_cuda() || (cuda::emulated() && tensor.is_cpu());
}

// The value of such a tensor on the CPU; false where it is not there.
bool read_value(const at::Tensor& tensor, Number& number) {
  if (!tensor.is_cpu()) return false;
  number.dtype = static_cast<std::int64_t>(tensor.scalar_type());
  switch (tensor.scalar_type()) {
    case at::kFloat:
      number.value = *tensor.const_data_ptr<float>();
      break;
    case at::kDouble:
      number.value = *tensor.const_data_ptr<double>();
      break;
    default:
      number.value = tensor.item<double>();
  }
  return true;
}

// Its address on another device; null where it is not there, or of a type that no kernel reads.
const void* address_of(const at::Tensor& tensor) {
  const bool read = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
  return read && on_other_device(tensor) ? tensor.const_data_ptr() : nullptr;
}

bool is_numpy_float(PyObject* object) {
  return std::strcmp(Py_TYPE(object)->tp_name, "numpy.float64") == 0;
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

// A key's value, or one of the pair that it holds. A pair in a list may change unnoticed.
OptionReader::Read OptionReader::read_hyper(PyObject* object, const Hyper& hyper, Seen& seen,
                                            Number& number) {
  if (hyper.element < 0) return read_number(object, hyper.kind, seen, number);
  const bool fixed = PyTuple_CheckExact(object);
  if ((!fixed && !PyList_CheckExact(object)) || PySequence_Fast_GET_SIZE(object) != 2) {
    return Read::kNot;
  }
  const Read read =
      read_number(PySequence_Fast_GET_ITEM(object, hyper.element), hyper.kind, seen, number);
  return read == Read::kConstant && !fixed ? Read::kMutable : read;
}

OptionReader::Read OptionReader::read_number(PyObject* object, Hyper::Kind kind, Seen& seen,
                                             Number& number) {
  if (object == seen.object.get()) {
    number = seen.number;
    return Read::kConstant;
  }
  if (kind == Hyper::kFlag) {
    bool flag;
    if (!read_flag(object, flag)) return Read::kNot;
    number = flag ? 1.0 : 0.0;
  } else if (PyFloat_Check(object)) {
    number = PyFloat_AS_DOUBLE(object);
    if (!PyFloat_CheckExact(object)) {
      // A subclass may compute in its own way, and hold on to anything. NumPy's does neither.
      return is_numpy_float(object) ? Read::kMutable : Read::kNot;
    }
  } else if (PyLong_CheckExact(object)) {
    number = PyLong_AsDouble(object);
    if (number.value == -1 && PyErr_Occurred()) throw python_error();
  } else {
    const at::Tensor* tensor = kind == Hyper::kNumber ? nullptr : scalar_tensor(object);
    if (tensor == nullptr) return Read::kNot;
    if (kind == Hyper::kNumberOrScalar && tensor->dim() != 0) return Read::kNot;
    if (kind == Hyper::kNumberOrSingle && tensor->scalar_type() != at::kFloat) return Read::kNot;
    if (const void* address = address_of(*tensor)) {
      if (device_.value_or(tensor->device()) != tensor->device()) return Read::kNot;
      device_ = tensor->device();
      number = Number::at(address, static_cast<std::int64_t>(tensor->scalar_type()));
    } else if (!read_value(*tensor, number)) {
      return Read::kNot;
    }
    const auto begin = reinterpret_cast<std::uintptr_t>(tensor->const_data_ptr());
    tensors_.push_back({begin, begin + tensor->itemsize()});
    return Read::kMutable;
  }
  seen.object = Ref::borrow(object);  // immutable, so the same object is the same value
  seen.number = number;
  return Read::kConstant;
}

const GroupOptions& OptionReader::read(PyObject* group, std::size_t number) {
  if (knows(group, number)) return seen_[number].options;
  if (number >= seen_.size()) seen_.resize(number + 1);
  GroupSeen& seen = seen_[number];
  GroupOptions& options = seen.options;
  const std::uint64_t version = version_of(group);
  seen.version = 0;
  options = {};
  options.params = params_.needed_in(group);
  seen.group = group;
  seen.items = PyList_CheckExact(options.params) ? &PyList_GET_ITEM(options.params, 0) : nullptr;
  seen.hypers.resize(hyper_keys_.size());
  options.readable = read_flag(maximize_.needed_in(group), options.maximize);
  // A group of a checkpoint may say so, and stock then computes some scalars in another way.
  if (PyObject* differentiable = differentiable_.optional_in(group)) {
    bool differentiates = false;
    options.readable &= read_flag(differentiable, differentiates) && !differentiates;
  }
  bool constant = true;
  device_.reset();
  for (std::size_t i = 0; i < hyper_keys_.size(); ++i) {
    const Read read = read_hyper(hyper_keys_[i].needed_in(group), rule_.hypers[i], seen.hypers[i],
                                 options.hypers[i]);
    options.readable &= read != Read::kNot;
    constant &= read == Read::kConstant;
    options.promotes |= options.hypers[i].tensor_dtype() == static_cast<std::int64_t>(at::kDouble);
  }
  options.device = device_;
  if (!options.readable) return options;
  options.structure = rule_.structure(options.hypers);
  if (constant) seen.version = version;
  return options;
}

Scaling OptionReader::read_scaling(PyObject* attributes) {
  Scaling scaling;
  const auto read = [&](PyObject* object, Number& number, const float*& address) {
    const at::Tensor* tensor = scalar_tensor(object);
    if (tensor == nullptr) return false;
    if (!on_other_device(*tensor)) return read_value(*tensor, number);
    if (tensor->scalar_type() != at::kFloat) return false;
    if (scaling.device.value_or(tensor->device()) != tensor->device()) return false;
    scaling.device = tensor->device();
    address = tensor->const_data_ptr<float>();
    return true;
  };
  if (PyObject* found_inf = found_inf_.ask(attributes)) {
    Number found;
    if (!read(found_inf, found, scaling.found_inf_at)) return scaling;
    scaling.skip = found.value != 0;
  }
  if (PyObject* grad_scale = grad_scale_.ask(attributes)) {
    Number scale = 1;
    if (!read(grad_scale, scale, scaling.scale_at)) return scaling;
    scaling.scale = scale.value;
    scaling.unscale = true;
  }
  scaling.readable = true;
  return scaling;
}

void OptionReader::refuse(Place place, PyObject* group, PyObject* param) {
  for (std::size_t i = 0; i < hyper_keys_.size(); ++i) {
    if (rule_.hypers[i].kind == Hyper::kFlag || rule_.hypers[i].element >= 0) continue;
    const char* name = rule_.hypers[i].name;
    PyObject* option = hyper_keys_[i].needed_in(group);
    if (any_tensor(option)) {
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
