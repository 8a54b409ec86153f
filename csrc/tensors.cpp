#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "plain.h"

namespace fastsgd {
namespace {

// Whether broadcasting makes a tensor of shape `from` one of shape `to`.
bool expands_to(at::IntArrayRef from, at::IntArrayRef to) {
  if (from.size() > to.size()) return false;
  const std::size_t skip = to.size() - from.size();
  for (std::size_t d = 0; d < from.size(); ++d) {
    if (from[d] != 1 && from[d] != to[skip + d]) return false;
  }
  return true;
}

constexpr char kInference[] =
    "is an inference tensor. Inplace update to inference tensor outside InferenceMode is not "
    "allowed. You can make a clone to get a normal tensor before doing inplace update.";
constexpr char kExpanded[] =
    "is expanded. unsupported operation: more than one element of the written-to tensor refers to "
    "a single memory location. Please clone() the tensor before performing the operation.";

// Throws where a tensor that was made in inference mode, and so counts no writes, is to be written
// outside of it.
void check_inference_mode(Place place, const std::string& name) {
  TORCH_CHECK(c10::InferenceMode::is_enabled(), at_place(place), ": ", name, " ", kInference);
}

void check_average(Place place, const Update& update, const c10::TensorImpl& param,
                   const c10::TensorImpl& average) {
  const auto wanted = average_type(update, param);
  TORCH_CHECK(average.dtype() == wanted && same_sizes(average.sizes(), param.sizes()),
              at_place(place), ": its state 'ema' has dtype ",
              c10::typeMetaToScalarType(average.dtype()), " and shape ", average.sizes(),
              ", and must have dtype ", c10::typeMetaToScalarType(wanted), " and shape ",
              param.sizes(), ". Was the parameter's data or its dtype changed?");
}

// Whether stock, which interpolates from the state to the gradient, finds them of one dtype.
bool can_be_lerped(at::ScalarType state, const c10::TensorImpl& grad, const c10::TensorImpl& param,
                   bool adds_param) {
  const auto of_grad = c10::typeMetaToScalarType(grad.dtype());
  if (!adds_param) return state == of_grad;
  if (grad.dim() != param.dim()) return true;  // promotion then has more rules
  return state == c10::promoteTypes(of_grad, c10::typeMetaToScalarType(param.dtype()));
}

// Whether sizes and strides say where in its storage a tensor's elements lie. Of one that would
// answer by Python code nothing is asked.
bool lies_as_it_says(const c10::TensorImpl& tensor) {
  return !tensor.is_python_dispatch() && tensor.has_storage() && tensor.layout() == at::kStrided &&
         !tensor.is_nested() && !tensor.has_symbolic_sizes_strides();
}

std::string too_few_bytes(const c10::TensorImpl& tensor) {
  return c10::str(tensor.storage().nbytes(), " bytes, too few for its shape ", tensor.sizes(),
                  ". Was it freed or resized?");
}

// Where in the storage, in bytes, the last of those elements ends; 0 where there are none.
std::size_t end_in_storage(const c10::TensorImpl& tensor) {
  return at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                          static_cast<std::size_t>(tensor.storage_offset()));
}

}  // namespace

bool same_layout(const c10::TensorImpl& a, const c10::TensorImpl& b) {
  if (!same_sizes(a.sizes(), b.sizes())) return false;
  if (a.is_contiguous() && b.is_contiguous()) return true;
  if (!a.is_non_overlapping_and_dense() || !b.is_non_overlapping_and_dense()) return false;
  return a.strides() == b.strides();
}

at::Tensor new_average(const Update& update, const at::Tensor& param) {
  const auto dtype = c10::typeMetaToScalarType(average_type(update, *param.unsafeGetTensorImpl()));
  return param.detach().to(dtype, /*non_blocking=*/false, /*copy=*/true);
}

std::string at_place(Place place) {
  if (place.group < 0) return c10::str("parameter ", place.index, " of those with an average");
  return c10::str("param_groups[", place.group, "]['params'][", place.index, "]");
}

std::string stream_name(const Structure& structure, int stream) {
  if (stream < kState) return structure.before_states[stream];
  return c10::str("its state '", structure.state[stream - kState].name, "'");
}

bool check_kinds(const Plain& plain, Place place, const Update& update, const Subject& subject,
                 Owners owners) {
  const Structure& structure = *update.structure;
  const c10::TensorImpl& param = *subject.tensor[kParam];
  if (!plain.is(param) && !plain.is_inference(param)) return false;
  const std::optional<Storage> type = storage_type(param);
  bool takes = type.has_value() && update.takes(*type);
  for (int s = 0; s < subject.streams; ++s) {
    if (subject.tensor[s] == nullptr) continue;
    c10::TensorImpl& tensor = *subject.tensor[s];
    const auto name = [&] { return stream_name(structure, s); };
    TORCH_CHECK(tensor.device() == param.device(), at_place(place), " is on ", param.device(),
                " but ", name(), " is on ", tensor.device(),
                ". Expected all tensors to be on the same device.");
    if (update.writes(s) && owners[s] != nullptr && !owners[s]->version_counter().enabled()) {
      check_inference_mode(place, name());
    }
    if (!plain.is(tensor) && !plain.is_inference(tensor)) {
      takes = false;  // sparse, a subclass, ...: only its own operators know what fits
      continue;
    }
    const bool is_average = structure.average >= 0 && s == kState + structure.average;
    if (is_average) check_average(place, update, param, tensor);
    const auto wanted = is_average ? average_type(update, param) : param.dtype();
    if (tensor.dtype() == wanted && same_sizes(tensor.sizes(), param.sizes())) continue;
    takes = false;
    TORCH_CHECK(expands_to(tensor.sizes(), param.sizes()), at_place(place), " has shape ",
                param.sizes(), " but ", name(), " has shape ", tensor.sizes(),
                ", which does not broadcast to it. Was the parameter's data swapped?");
    if (s < kState) continue;
    TORCH_CHECK(expands_to(subject.tensor[kGrad]->sizes(), tensor.sizes()), at_place(place),
                " has a grad of shape ", subject.tensor[kGrad]->sizes(), " but ", name(),
                " has shape ", tensor.sizes(),
                ", to which that does not broadcast. Was the parameter's data swapped?");
    const auto of_param = c10::typeMetaToScalarType(param.dtype());
    const auto of_state = c10::typeMetaToScalarType(tensor.dtype());
    const auto promoted = c10::promoteTypes(of_param, of_state);
    TORCH_CHECK(c10::canCast(promoted, of_state) && c10::canCast(promoted, of_param),
                at_place(place), " has dtype ", of_param, " but ", name(), " has dtype ", of_state,
                ", whose result can't be cast to it. Is the checkpoint corrupt?");
  }
  const c10::TensorImpl& grad = *subject.tensor[kGrad];
  if (!plain.is(grad) && !plain.is_inference(grad)) return false;
  for (int s = kState; s < subject.streams; ++s) {
    if (!structure.state[s - kState].lerped) continue;
    // One that is still to be made has the parameter's dtype.
    const c10::TensorImpl* state = subject.tensor[s];
    const auto of_state = c10::typeMetaToScalarType((state == nullptr ? param : *state).dtype());
    TORCH_CHECK(can_be_lerped(of_state, grad, param, update.adds_param), at_place(place),
                " has a grad of dtype ", c10::typeMetaToScalarType(grad.dtype()), " but ",
                stream_name(structure, s), " has dtype ", of_state,
                ", which is not averaged with it. Cast one of them to the other's dtype.");
  }
  return takes;
}

void check_counter(Place place, const c10::TensorImpl& counter) {
  TORCH_CHECK(counter.numel() == 1, at_place(place), ": its state 'step' has shape ",
              counter.sym_sizes(), ", and must be one number. Is the checkpoint corrupt?");
  if (!counter.version_counter().enabled()) check_inference_mode(place, "its state 'step'");
  TORCH_CHECK(has_memory(counter), at_place(place), ": the storage of its state 'step' holds ",
              counter.storage().nbytes(),
              " bytes, too few for one number. Was it freed or resized?");
}

bool has_memory(const c10::TensorImpl& tensor) {
  if (!lies_as_it_says(tensor) || tensor.is_meta()) return true;
  return tensor.unsafe_storage().nbytes() >= end_in_storage(tensor);
}

bool is_expanded(const c10::TensorImpl& tensor) {
  if (!lies_as_it_says(tensor)) return false;
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (strides[d] == 0 && sizes[d] > 1) return true;
  }
  return false;
}

std::string why_not_zeroed(const at::Tensor& grad) {
  if (grad.is_inference() && !c10::InferenceMode::is_enabled()) {
    return "is an inference tensor. Inplace update to inference tensor outside InferenceMode is "
           "not allowed";
  }
  if (grad.requires_grad() && grad.grad_fn() != nullptr && grad.is_view()) {
    return "is a view in a graph. Can't detach views in-place, so it cannot be zeroed";
  }
  return {};
}

std::string why_not_written(const c10::TensorImpl& tensor) {
  if (!tensor.version_counter().enabled() && !c10::InferenceMode::is_enabled()) return kInference;
  if (is_expanded(tensor)) return kExpanded;
  if (has_memory(tensor)) return {};
  return "has a storage of " + too_few_bytes(tensor);
}

Range reach(const c10::TensorImpl& tensor) {
  const auto storage = reinterpret_cast<std::uintptr_t>(tensor.storage().data());
  if (!lies_as_it_says(tensor)) return {storage, storage + tensor.storage().nbytes()};
  const std::size_t end = end_in_storage(tensor);
  const auto offset = static_cast<std::size_t>(tensor.storage_offset()) * tensor.itemsize();
  return {storage + std::min(offset, end), storage + end};
}

void storage_too_small(const std::string& what, const c10::TensorImpl& tensor) {
  TORCH_CHECK(false, what, " holds ", too_few_bytes(tensor));
}

void written_but_expanded(Place place, const Structure& structure, int stream) {
  TORCH_CHECK(false, at_place(place), ": ", stream_name(structure, stream), " ", kExpanded);
}

}  // namespace fastsgd
