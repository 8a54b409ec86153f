#include "lists.h"

#include <algorithm>
#include <numeric>

#include "cpu/engine.h"
#include "cuda/devices.h"
#include "cuda/emulation.h"
#include "lookahead.h"
#include "modes.h"
#include "plan.h"
#include "pytensor.h"

namespace fastsgd {
namespace {

// The storage type of a tensor whose memory says all about it, in whatever order; kStorages for any
// other.
int type_of(const c10::TensorImpl& tensor) {
  const int type = plain().type_of(tensor);
  if (type == kStorages) return kStorages;
  const std::int64_t end = (Fields::offset(tensor) + Fields::count(tensor)) * kItemSizes[type];
  const auto held = static_cast<std::int64_t>(tensor.unsafe_storage().nbytes());
  return held < end ? kStorages : type;
}

// Has `take` take each tensor of a list, or its gradient, with its number; returns the numbers of
// those that it does not take.
template <class Take>
[[gnu::flatten]] Left each(PyObject* list, bool of_grads, Take take) {
  Left left;
  const bool directly = !any_mode();
  const auto taken = [&](const at::Tensor& tensor, Py_ssize_t i) {
    PyObject* object = object_of(*tensor.unsafeGetTensorImpl());
    return (object == nullptr || exact_tensor(object)) && take(tensor, i);
  };
  const Py_ssize_t size = PyList_GET_SIZE(list);
  if (directly && of_grads) {
    GradsAhead ahead(list);
    for (Py_ssize_t i = 0; i < size; ++i) {
      const GradsAhead::Found& found = ahead.next();
      const bool has_grad = found.slot != nullptr && found.slot->defined();
      if (found.param == nullptr || (has_grad && !taken(*found.slot, i))) left.push_back(i);
    }
    return left;
  }
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* object = PyList_GET_ITEM(list, i);
    if (!directly || !exact_tensor(object) || !taken(tensor_of(object), i)) left.push_back(i);
  }
  return left;
}

}  // namespace

NormOfAll norm_of_all(PyObject* list, bool of_grads, bool infinity) {
  NormOfAll norm;
  const Order order = infinity ? Order::kInfinity : Order::kTwo;
  Measured measured{};
  const Measure* measures = kernels().measures(order);
  std::vector<Run> runs;  // those that are long enough to be shared among threads
  std::vector<Span> spans;
  const bool here = !of_grads || !cuda::emulated();  // single norms are always found here
  norm.left = each(list, of_grads, [&](const at::Tensor& tensor, Py_ssize_t number) {
    const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
    const int type = here ? type_of(impl) : kStorages;
    if (type == kStorages) {  // whoever takes it does not look at its memory before
      if (has_memory(impl)) return false;
      storage_too_small(of_grads ? c10::str("parameters[", number, "]: the storage of its grad")
                                 : "the storage of a grad",
                        impl);
    }
    norm.any_double |= type == static_cast<int>(Storage::kDouble);
    ++norm.count;
    char* elements = data_of(*storage_of(impl), false) + Fields::offset(impl) * kItemSizes[type];
    const std::int64_t count = Fields::count(impl);
    if (count <= kPiece) {
      measured.add(measures[type](elements, count), order);
      return true;
    }
    if (spans.empty() || spans.back().kernel != type) {
      const auto first = static_cast<std::int64_t>(runs.size());
      // The kernel of whatever rule: who measures asks it for the storage type alone.
      spans.push_back({type, nullptr, 0, kItemSizes[type], 2, -1, first, first});
    }
    Run& run = runs.emplace_back();
    run.stream[kGrad] = elements;
    run.count = count;
    spans.back().end = static_cast<std::int64_t>(runs.size());
    return true;
  });
  if (!runs.empty()) measured.add(measure(spans, runs.data(), order));
  norm.value = norm_of(measured, order, 1, true);
  return norm;
}

Left scale_all(PyObject* list, bool of_grads, double factor) {
  Plan plan;
  plan.begin();
  Left left = each(list, of_grads, [&](const at::Tensor& tensor, Py_ssize_t) {
    return !tensor.requires_grad() && plan.add_single(tensor, kScale);
  });
  Around around;
  around.clips = true;
  around.factor = factor;
  plan.run(around, true);
  return left;
}

// Each call has tables of its own on a device, and what its blocks add to: nothing orders the calls
// of several streams.
at::Tensor clip_there(PyObject* list, double max_norm, bool infinity, bool raises) {
  cuda::Devices all;
  cuda::DeviceWork* there = nullptr;
  const Left left = each(list, true, [&](const at::Tensor& grad, Py_ssize_t) {
    auto* work = all.find(*grad.unsafeGetTensorImpl());
    if (work == nullptr || (there != nullptr && work != there)) return false;
    there = work;
    return !grad.requires_grad() && work->plan.add_single(grad, kScale);
  });
  if (there == nullptr || !left.empty() || there->plan.ordered()) return {};
  Around around;
  around.clips = true;
  const bool is_double = there->plan.any_double();
  const Order order = infinity ? Order::kInfinity : Order::kTwo;
  there->prepare({}, around, {true, order, is_double, true, max_norm, false, raises});
  there->launch();
  return there->norm(is_double);
}

Left exchange_all(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& averages) {
  Plan plan;
  plan.begin();
  cuda::Devices all;
  const bool directly = !any_mode();
  Left left;
  for (std::size_t i = 0; i < params.size(); ++i) {
    const at::Tensor &param = params[i], &average = averages[i];
    for (const at::Tensor* tensor : {&param, &average}) {
      if (has_memory(*tensor->unsafeGetTensorImpl())) continue;
      storage_too_small(tensor == &param ? "the storage of a parameter that has an average"
                                         : "the storage of a parameter's average",
                        *tensor->unsafeGetTensorImpl());
    }
    const auto number = static_cast<std::int64_t>(i);
    auto* work = directly ? all.find(*param.unsafeGetTensorImpl()) : nullptr;
    Plan& where = work == nullptr ? plan : work->plan;
    if (!directly || param.dtype() != average.dtype() ||
        !where.add_exchange(number, param, average)) {
      left.push_back(number);
    }
  }
  const std::vector<cuda::DeviceWork*> works = all.needed();
  if (std::any_of(works.begin(), works.end(), [](auto* work) { return work->plan.ordered(); })) {
    left.resize(params.size());  // a device has no order: one after the other, then
    std::iota(left.begin(), left.end(), 0);
    return left;
  }
  for (cuda::DeviceWork* work : works) work->prepare();
  for (cuda::DeviceWork* work : works) work->launch();
  plan.run({}, true);
  return left;
}

std::vector<c10::Device> devices_of(PyObject* list) {
  std::vector<c10::Device> devices;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const Ref tensor = Ref::borrow(PyList_GET_ITEM(list, i));
    if (!any_tensor(tensor.get())) continue;
    const c10::Device device = tensor_of(tensor.get()).device();
    if (std::find(devices.begin(), devices.end(), device) == devices.end()) {
      devices.push_back(device);
    }
  }
  return devices;
}

}  // namespace fastsgd
