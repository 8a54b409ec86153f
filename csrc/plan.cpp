#include "plan.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <Python.h>

#include <optional>

namespace fastsgd {
namespace {

// --- what the kernels can take ------------------------------------------------------------------

// A dense, strided CPU tensor and nothing else: no subclass, no wrapper, no lazy negation or conjugation.
bool plain(const c10::TensorImpl& tensor) {
  static const c10::DispatchKeySet keys = at::empty({0}).key_set();
  return tensor.key_set() == keys;
}

// The same, made in inference mode.
bool plain_inference(const c10::TensorImpl& tensor) {
  static const c10::DispatchKeySet keys = [] {
    c10::InferenceMode guard;
    return at::empty({0}).key_set();
  }();
  return tensor.key_set() == keys;
}

std::optional<Storage> storage_type(const c10::TensorImpl& tensor) {
  switch (c10::typeMetaToScalarType(tensor.dtype())) {
    case at::kFloat: return Storage::kFloat;
    case at::kDouble: return Storage::kDouble;
    case at::kBFloat16: return Storage::kBFloat16;
    case at::kHalf: return Storage::kHalf;
    default: return std::nullopt;
  }
}

// Whether broadcasting makes a tensor of shape `from` one of shape `to`.
bool expands_to(at::IntArrayRef from, at::IntArrayRef to) {
  if (from.size() > to.size()) return false;
  const std::size_t skip = to.size() - from.size();
  for (std::size_t d = 0; d < from.size(); ++d) {
    if (from[d] != 1 && from[d] != to[skip + d]) return false;
  }
  return true;
}

// --- messages -----------------------------------------------------------------------------------

std::string at_place(const Place& place) {
  return c10::str("param_groups[", place.group, "]['params'][", place.index, "]");
}

void check_writable(const Place& place, c10::TensorImpl& tensor, const char* what) {
  TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), at_place(place), ": ", what,
              " is an inference tensor. Inplace update to inference tensor outside InferenceMode is "
              "not allowed. You can make a clone to get a normal tensor before doing inplace update.");
}

void check_shape(const Place& place, const c10::TensorImpl& param, const c10::TensorImpl& other,
                 const char* what) {
  TORCH_CHECK(expands_to(other.sizes(), param.sizes()), at_place(place), " has shape ",
              param.sizes(), " but its ", what, " has shape ", other.sizes(),
              ", which cannot be broadcast to it. Was the parameter's data swapped? Clear its ", what,
              ".");
}

// Storage can be smaller than a shape asks for, after untyped_storage().resize_(0) for one.
void check_backed(const Place& place, const c10::TensorImpl& tensor, std::int64_t extent,
                  const char* what) {
  const std::size_t item = tensor.itemsize();
  const std::size_t needs = (static_cast<std::size_t>(tensor.storage_offset() + extent)) * item;
  TORCH_CHECK(tensor.storage().nbytes() >= needs, at_place(place), ": the storage of its ", what,
              " holds ", tensor.storage().nbytes(), " bytes but its shape ", tensor.sizes(),
              " needs ", needs, ". Was it freed or resized?");
}

bool same_layout(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  if (a.sizes() != b.sizes()) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  if (!a.is_non_overlapping_and_dense() || !b.is_non_overlapping_and_dense()) return false;
  return a.strides() == b.strides();
}

char* writable_data(c10::TensorImpl& tensor) {
  return static_cast<char*>(tensor.mutable_data());  // a lazily copied storage is copied here
}

Range range_of(const char* begin, std::int64_t extent, std::size_t item) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  return {address, address + static_cast<std::size_t>(extent) * item};
}

// The GIL released while the GIL is held, and held again after.
class WithoutGil {
 public:
  explicit WithoutGil(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace

void Plan::begin() {
  used_ = 0;
  layouts_used_ = 0;
  bytes_ = 0;
  rows_.clear();
  aliases_.begin();
  retaining_ = false;
  retained_.clear();
  storages_.clear();
}

std::int32_t Plan::add_row(const Row& row) {
  rows_.push_back(row);
  return static_cast<std::int32_t>(rows_.size() - 1);
}

// Finds how the streams lie: flat, or as a layout that is checked and kept. False for stock's path.
bool Plan::lay_out(const Place& place, const Rule& rule, const Owners& owners, bool unscale,
                   Work& work, std::int64_t* extents) {
  const c10::TensorImpl& param = *owners.stream[kParam];
  bool flat = true;
  for (int s = kGrad; s < owners.streams; ++s) flat &= same_layout(param, *owners.stream[s]);
  work.layout = nullptr;
  if (flat) {
    std::fill_n(extents, owners.streams, work.count);
    return true;
  }
  if (param.dim() > kMaxDims) return false;
  if (layouts_used_ == layouts_.size()) layouts_.emplace_back();
  Layout& layout = layouts_[layouts_used_];
  layout.dims = static_cast<int>(param.dim());
  for (int d = 0; d < layout.dims; ++d) {
    layout.size[d] = param.sizes()[d];
    for (int s = 0; s < owners.streams; ++s) layout.stride[d][s] = owners.stream[s]->strides()[d];
  }
  layout.simplify(owners.streams);
  for (int s = 0; s < owners.streams; ++s) {
    extents[s] = layout.extent(s);
    if (s == kGrad && !unscale) continue;
    for (int d = 0; d < layout.dims; ++d) {
      TORCH_CHECK(layout.stride[d][s] != 0, at_place(place), ": ",
                  s == kParam  ? std::string("the parameter")
                  : s == kGrad ? std::string("its grad")
                               : c10::str("its state '", rule.states[s - kState], "'"),
                  " is expanded. unsupported operation: more than one element of the written-to "
                  "tensor refers to a single memory location. Please clone() the tensor before "
                  "performing the operation.");
    }
    if (!layout.injective(s)) return false;
  }
  ++layouts_used_;
  work.layout = &layout;
  return true;
}

bool Plan::add(const Place& place, const Rule& rule, const Kernel (&kernels)[kStorages],
               std::int32_t row, const Subject& subject, at::Tensor* created) {
  c10::TensorImpl& param = *subject.param;
  c10::TensorImpl& grad = *subject.grad->unsafeGetTensorImpl();
  const bool unscale = rows_[static_cast<std::size_t>(row)].unscale;

  // What the tensors are.
  if (!plain(param)) {
    if (!plain_inference(param)) return false;
    check_writable(place, param, "the parameter");
  }
  const auto storage = storage_type(param);
  if (!storage) return false;
  if (!plain(grad) && !plain_inference(grad)) {
    TORCH_CHECK(grad.device() == param.device(), at_place(place), " is on ", param.device(),
                " but its grad is on ", grad.device(),
                ". Expected all tensors to be on the same device. Clear its grad.");
    return false;
  }
  if (unscale) check_writable(place, grad, "the grad");
  bool same = grad.dtype() == param.dtype() && grad.sizes() == param.sizes();
  if (!same) check_shape(place, param, grad, "grad");
  for (int i = 0; i < subject.states; ++i) {
    if (subject.state[i] == nullptr) continue;
    c10::TensorImpl& state = *subject.state[i];
    const auto name = [&] { return c10::str("state '", rule.states[i], "'"); };
    if (!plain(state)) {
      if (plain_inference(state)) {
        check_writable(place, state, name().c_str());
      } else {
        TORCH_CHECK(state.device() == param.device(), at_place(place), " is on ", param.device(),
                    " but its ", name(), " is on ", state.device(),
                    ". Expected all tensors to be on the same device. Delete the state.");
        return false;
      }
    }
    if (state.dtype() == param.dtype() && state.sizes() == param.sizes()) continue;
    same = false;
    check_shape(place, param, state, name().c_str());
    check_shape(place, state, grad, "grad");
    TORCH_CHECK(at::isFloatingType(c10::typeMetaToScalarType(state.dtype())), at_place(place),
                ": its ", name(), " has dtype ", c10::toString(c10::typeMetaToScalarType(state.dtype())),
                ", which cannot hold a fraction. Is the checkpoint corrupt? Delete the state.");
  }
  if (!same) return false;

  // What is missing is made as stock makes it: laid out like the gradient.
  Owners owners{{&param, &grad}, kState + subject.states, unscale};
  for (int i = 0; i < subject.states; ++i) {
    if (subject.state[i] == nullptr) {
      if (!same_layout(param, grad)) return false;
      created[i] = at::empty_like(*subject.grad);
      owners.stream[kState + i] = created[i].unsafeGetTensorImpl();
    } else {
      owners.stream[kState + i] = subject.state[i];
    }
  }
  if (param.numel() == 0) return true;

  // Where they lie.
  Work work;
  work.count = param.numel();
  work.kernel = kernels[static_cast<int>(*storage)];
  work.row = row;
  work.item_size = static_cast<std::uint8_t>(param.itemsize());
  work.streams = static_cast<std::uint8_t>(owners.streams);
  std::int64_t extents[kMaxStreams];
  if (!lay_out(place, rule, owners, unscale, work, extents)) return false;
  Range ranges[kMaxStreams];
  for (int s = 0; s < owners.streams; ++s) {
    c10::TensorImpl& tensor = *owners.stream[s];
    check_backed(place, tensor, extents[s],
                 s == kParam ? "data" : s == kGrad ? "grad" : rule.states[s - kState]);
    const bool written = s != kGrad || unscale;
    work.stream[s] =
        written ? writable_data(tensor) : static_cast<char*>(const_cast<void*>(tensor.data()));
    ranges[s] = range_of(work.stream[s], extents[s], work.item_size);
  }

  // Streams of one parameter that share memory: only stock's order of passes gives stock's result.
  for (int s = 0; s < owners.streams; ++s) {
    for (int t = 0; t < s; ++t) {
      if (ranges[s].meets(ranges[t])) return false;
    }
  }
  for (int s = 0; s < owners.streams; ++s) {
    const bool written = s != kGrad || unscale;
    written ? aliases_.writes(ranges[s]) : aliases_.reads(ranges[s]);
  }
  push(work, owners);
  return true;
}

bool Plan::add_zero(const at::Tensor& grad) {
  c10::TensorImpl& tensor = *grad.unsafeGetTensorImpl();
  if (!plain(tensor) || !tensor.is_non_overlapping_and_dense()) return false;
  if (tensor.numel() == 0) return true;
  Work work{};
  work.count = tensor.numel() * static_cast<std::int64_t>(tensor.itemsize());
  if (tensor.storage().nbytes() <
      static_cast<std::size_t>(tensor.storage_offset()) * tensor.itemsize() + work.count) {
    return false;
  }
  work.stream[kParam] = writable_data(tensor);
  work.kernel = zero;
  work.item_size = 1;
  work.streams = 1;
  if (rows_.empty()) rows_.emplace_back();
  push(work, {{&tensor}, 1, false});
  return true;
}

void Plan::push(const Work& work, const Owners& owners) {
  if (used_ == work_.size()) {
    work_.push_back(work);
    owners_.push_back(owners);
  } else {
    work_[used_] = work;
    owners_[used_] = owners;
  }
  ++used_;
  bytes_ += bytes_of(work);
  if (retaining_) retain(owners);
}

bool Plan::ordered() { return aliases_.found(); }

void Plan::retain(const Owners& owners) {
  for (int s = 0; s < owners.streams; ++s) {
    c10::TensorImpl* tensor = owners.stream[s];
    retained_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(tensor));
    storages_.push_back(tensor->storage());
  }
}

void Plan::retain() {
  if (retaining_) return;
  retaining_ = true;
  for (std::size_t i = 0; i < used_; ++i) retain(owners_[i]);
}

void Plan::run() {
  for (std::size_t i = 0; i < used_; ++i) {
    const Owners& owners = owners_[i];
    for (int s = 0; s < owners.streams; ++s) {
      const bool written = s != kGrad || owners.writes_grad;
      if (written && !owners.stream[s]->is_inference()) owners.stream[s]->bump_version();
    }
  }
  const bool long_work = bytes_ >= kLongWork;
  const bool in_order = ordered();
  if (long_work) retain();
  {
    const WithoutGil guard(long_work);
    fastsgd::run(work_.data(), used_, rows_.data(), bytes_, in_order);
  }
  retaining_ = false;
  retained_.clear();
  storages_.clear();
}

}  // namespace fastsgd
