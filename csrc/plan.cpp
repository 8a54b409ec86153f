#include "plan.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/neg.h>

namespace fastsgd {
namespace {

// A tensor for a state, its memory laid out as stock's operators would lay it out.
at::Tensor empty_state(const Birth& birth, c10::TensorImpl& param, c10::TensorImpl& grad) {
  if (birth.how == NewState::kFilled) {
    return at::empty_like(tensor_of(param), at::TensorOptions().requires_grad(false));
  }
  const at::Tensor g = tensor_of(grad);
  const bool alike = grad.is_contiguous() && grad.strides() == param.strides();
  if (alike || (!birth.adds_param && !birth.maximize)) return at::empty_like(g);
  const auto shape_of = [](const c10::TensorImpl& tensor) {
    return at::empty_strided(tensor.sizes(), tensor.strides(), at::device(at::kMeta));
  };
  at::Tensor like = shape_of(grad);
  if (birth.maximize) like = at::neg(like);
  if (birth.adds_param) like = at::add(like, shape_of(param));
  return at::empty_strided(like.sizes(), like.strides(), g.options().requires_grad(false));
}

// The same with what it begins as, unless that is a copy of the gradient, which the step makes.
at::Tensor new_state(const Birth& birth, c10::TensorImpl& param, c10::TensorImpl& grad) {
  at::Tensor state = empty_state(birth, param, grad);
  if (birth.how != NewState::kFilled) return state;
  if (!state.is_cpu()) return state.fill_(birth.fill);
  fill(state.mutable_data_ptr(), state.numel(), *storage_type(param), birth.fill);
  return state;
}

}  // namespace

// Those with a stream of float32 are in spans of their own.
int Plan::span_key(int kernel, Traits traits) {
  return traits.wide() < 0 ? kernel : kernel + kAllKernels;
}

void Plan::begin() {
  used_ = holders_used_ = owners_used_ = layouts_used_ = 0;
  bytes_ = 0;
  counters_.begin();
  scalars_.clear();
  spans_.clear();
  span_key_ = kNoKernel;
  rows_.clear();
  reserve();
  release();
}

std::int32_t Plan::add_row(const Row& row) {
  rows_.push_back(row);
  return static_cast<std::int32_t>(rows_.size() - 1);
}

void Plan::grow() {
  const std::size_t runs = 2 * runs_.size() + 8;
  holders_.resize((runs + kAhead) * kMaxStreams);
  owners_.resize((runs + kAhead + 1) * kMaxStreams);
  runs_.resize(runs);  // last: reserve() goes by its size, and the others may fail
}

bool Plan::add_unusual(const Update& update, Place place, const Subject& subject, Owners owners) {
  return check_kinds(plain_, place, update, subject, owners) &&
         add_checked(update, place, subject, owners);
}

bool Plan::add_creating(const Update& update, Place place, Subject& subject, Owners owners,
                        const Birth& birth, at::Tensor* created) {
  if (!check_kinds(plain_, place, update, subject, owners)) return false;
  for (int s = kState; s < subject.streams; ++s) {
    if (subject.tensor[s] != nullptr) continue;
    c10::TensorImpl& param = *subject.tensor[kParam];
    created[s - kState] = s - kState == update.structure->average
                              ? new_average(update, tensor_of(param))
                              : new_state(birth, param, *subject.tensor[kGrad]);
    subject.tensor[s] = created[s - kState].unsafeGetTensorImpl();
  }
  return add_checked(update, place, subject, owners);
}

// Adds tensors of one dtype and one shape, whatever their layouts.
bool Plan::add_checked(const Update& update, Place place, const Subject& subject, Owners owners) {
  reserve();
  const c10::TensorImpl& param = *subject.tensor[kParam];
  const std::int64_t count = param.numel();

  bool flat = true;
  for (int s = kGrad; s < subject.streams; ++s) flat &= same_layout(param, *subject.tensor[s]);
  flat |= count == 0;
  if (layouts_used_ == layouts_.size()) layouts_.emplace_back();
  Layout& layout = layouts_[layouts_used_];
  if (!flat && !lay_out(update, place, subject, layout)) return false;

  const int type = static_cast<int>(*storage_type(param));
  const std::int64_t item_size = kItemSizes[type];
  const int average = update.structure->average < 0 ? -1 : kState + update.structure->average;
  const bool is_wide = average >= 0 && subject.tensor[average]->dtype() != param.dtype();
  const Traits traits(subject.streams, item_size, update.writes_grad, !flat,
                      is_wide ? average : -1);
  Run run;
  run.count = count;
  run.traits = traits.number;
  Holder* holders = &holders_[holders_used_];
  std::int64_t bytes[kMaxStreams];
  const Run& last = runs_[used_];
  const bool another = !flat || last.count != count || last.traits != run.traits;
  bool moved = another;
  for (int s = 0; s < subject.streams; ++s) {
    c10::TensorImpl& tensor = *subject.tensor[s];
    c10::StorageImpl* storage = storage_of(tensor);
    const auto size = static_cast<std::int64_t>(tensor.itemsize());
    bytes[s] = (flat ? count : layout.extent(s)) * size;
    const std::int64_t offset = tensor.storage_offset() * size;
    if (count > 0 && static_cast<std::int64_t>(storage->nbytes()) < offset + bytes[s]) {
      storage_too_small(
          c10::str(at_place(place), ": the storage of ", stream_name(*update.structure, s)),
          tensor);
    }
    run.stream[s] = data_of(*storage, update.writes(s)) + offset;
    moved |= run.stream[s] != last.stream[s];
    holders[s] = {&tensor, storage};
  }
  if (moved) {
    moved_ |= another;
    note_moves(last, run.stream, traits, holders[kGrad]);
    // Streams of one parameter that share memory: only stock's order of passes gives its result.
    for (int s = 0; s < subject.streams; ++s) {
      for (int t = 0; t < s; ++t) {
        if (meet(run.stream[s], bytes[s], run.stream[t], bytes[t])) return false;
      }
    }
    runs_[used_] = run;
  }
  if (!flat) ++layouts_used_;
  const int kernel = update.kernel + type;
  if (!flat || span_key(kernel, traits) != span_key_ || update.row != span_row_) {
    begin_span(kernel, update.row, flat ? nullptr : &layout, traits);
  }
  if (is_wide) bytes_ += count * (static_cast<std::int64_t>(sizeof(float)) - item_size);
  count_in(count * item_size, traits, owners);
  return true;
}

// Begins a span with the next run; it ends where another begins.
void Plan::begin_span(int kernel, std::int32_t row, const Layout* layout, Traits traits) {
  const auto first = static_cast<std::int64_t>(used_);
  spans_.push_back({kernel, layout, row, static_cast<std::int16_t>(traits.item_size()),
                    static_cast<std::int8_t>(traits.streams()),
                    static_cast<std::int8_t>(traits.wide()), first, first});
  span_key_ = layout == nullptr ? span_key(kernel, traits) : kNoKernel;
  span_row_ = row;
}

// Finds the one order in which to visit streams that are laid out differently, and checks that what
// is written is written once. False for stock's path.
bool Plan::lay_out(const Update& update, Place place, const Subject& subject, Layout& layout) {
  const c10::TensorImpl& param = *subject.tensor[kParam];
  if (param.dim() > kMaxDims) return false;
  layout.dims = static_cast<int>(param.dim());
  for (int d = 0; d < layout.dims; ++d) {
    layout.size[d] = param.sizes()[d];
    for (int s = 0; s < subject.streams; ++s) layout.stride[d][s] = subject.tensor[s]->strides()[d];
  }
  layout.simplify(subject.streams);
  for (int s = 0; s < subject.streams; ++s) {
    if (!update.writes(s)) continue;
    for (int d = 0; d < layout.dims; ++d) {
      if (layout.stride[d][s] == 0) written_but_expanded(place, *update.structure, s);
    }
    if (!layout.injective(s)) return false;
  }
  return true;
}

bool Plan::add_single(const at::Tensor& single, int kernel) {
  c10::TensorImpl& tensor = *single.unsafeGetTensorImpl();
  if (Fields::keys(tensor) != plain_.keys || !tensor.is_non_overlapping_and_dense() ||
      !tensor.version_counter().enabled()) {
    return false;
  }
  c10::StorageImpl* storage = storage_of(tensor);
  const auto item_size = static_cast<std::int64_t>(tensor.itemsize());
  const std::int64_t offset = tensor.storage_offset() * item_size,
                     bytes = tensor.numel() * item_size;
  if (static_cast<std::int64_t>(storage->nbytes()) < offset + bytes) return false;
  const bool in_bytes = kernel == kZero;
  if (!in_bytes) {
    const auto type = storage_type(tensor);
    if (!type) return false;
    kernel += static_cast<int>(*type);
  }
  if (rows_.empty()) rows_.emplace_back();
  reserve();
  moved_ = true;
  runs_[used_].stream[kParam] = data_of(*storage, true) + offset;
  runs_[used_].count = in_bytes ? bytes : tensor.numel();
  const Traits traits(1, in_bytes ? 1 : item_size, false, false);
  runs_[used_].traits = traits.number;
  c10::TensorImpl* const owner = &tensor;
  holders_[holders_used_] = {&tensor, storage};
  if (kernel != span_key_) begin_span(kernel, 0, nullptr, traits);
  count_in(bytes, traits, &owner);
  return true;
}

bool Plan::add_exchange(std::int64_t number, const at::Tensor& param, const at::Tensor& average) {
  static constexpr Structure kBoth{.before_states = {"its data", "its state 'ema'"}};
  if (rows_.empty()) rows_.emplace_back();
  const Update update{&kBoth, kExchange, 0, true};
  const Subject subject{{param.unsafeGetTensorImpl(), average.unsafeGetTensorImpl()}, 2};
  return add_unusual(update, {-1, number}, subject, subject.tensor);
}

}  // namespace fastsgd
