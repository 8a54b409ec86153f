#include "plan.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <Python.h>

#include "prefetch.h"

namespace fastsgd {
namespace {

constexpr std::int64_t kWorthTheGil = 8 << 20;  // bytes: about a millisecond

// The GIL given up, and taken again after.
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

char* data_of(c10::StorageImpl& storage, bool written) {
  // A storage that is copied lazily is copied by the first line.
  return static_cast<char*>(written ? storage.mutable_data() : const_cast<void*>(storage.data()));
}

// A tensor for a state, its memory laid out as stock's operators would lay it out.
at::Tensor new_state(StateLike like, c10::TensorImpl& param, c10::TensorImpl& grad) {
  const at::Tensor g(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(&grad));
  if (like == StateLike::kGrad || same_layout(param, grad)) return at::empty_like(g);
  const auto shape_of = [](const c10::TensorImpl& tensor) {
    return at::empty_strided(tensor.sizes(), tensor.strides(), at::device(at::kMeta));
  };
  const at::Tensor sum = at::add(shape_of(grad), shape_of(param));
  return at::empty_strided(sum.sizes(), sum.strides(), g.options().requires_grad(false));
}

bool written(const Update& update, int stream) { return stream != kGrad || update.writes_grad; }

}  // namespace

void Plan::begin() {
  used_ = owners_used_ = written_used_ = layouts_used_ = 0;
  bytes_ = 0;
  spans_.clear();
  rows_.clear();
  release();
}

std::int32_t Plan::add_row(const Row& row) {
  rows_.push_back(row);
  return static_cast<std::int32_t>(rows_.size() - 1);
}

// --- adding -------------------------------------------------------------------------------------

void Plan::grow() {
  reserved_ = 2 * reserved_ + 8;
  runs_.resize(reserved_);
  owners_.resize(reserved_ * kMaxStreams);
  written_.resize(reserved_ * kMaxStreams);
}

inline void Plan::count_in(const Update& update, Kernel kernel, const Layout* layout, int item_size,
                           int streams) {
  const Owner* owners = &owners_[owners_used_];
  if (retaining_) [[unlikely]]
    retain(owners_used_, streams);
  bytes_ += runs_[used_].count * item_size * streams;
  for (int s = 0; s < streams; ++s) {
    if (written(update, s)) written_[written_used_++] = owners[s].tensor;
  }
  owners_used_ += static_cast<std::size_t>(streams);
  const auto number = static_cast<std::int64_t>(used_++);
  if (Span* last = spans_.empty() ? nullptr : &spans_.back();
      last && last->kernel == kernel && last->row == update.row && !last->layout && !layout) {
    last->end = number + 1;
    return;
  }
  spans_.push_back({kernel, layout, update.row, static_cast<std::int16_t>(item_size),
                    static_cast<std::int16_t>(streams), number, number + 1});
}

FASTSGD_PREFETCHING void Plan::fetch_ahead(int streams) const {
  const std::size_t ahead = owners_used_ + kAhead * static_cast<std::size_t>(streams);
  if (ahead + static_cast<std::size_t>(streams) > owners_.size()) return;
  for (int s = 0; s < streams; ++s) {
    const Owner& owner = owners_[ahead + static_cast<std::size_t>(s)];
    prefetch<sizeof(c10::TensorImpl)>(owner.tensor);
    prefetch<56>(owner.storage);  // up to its size
  }
}

// The usual case, in few instructions: every tensor plain, contiguous, of one dtype and one shape,
// its storage large enough and its own. False where anything differs.
template <int kStreams>
bool Plan::add_usual(const Update& update, const Subject& subject) {
  reserve();
  fetch_ahead(kStreams);
  // All is read, and compared with the parameter's, before anything is noted down.
  const c10::TensorImpl& param = *subject.tensor[kParam];
  const caffe2::TypeMeta dtype = param.dtype();
  const at::IntArrayRef sizes = param.sizes();
  const auto type = storage_type(param);
  const std::int64_t count = param.numel();
  if (!type || count == 0) [[unlikely]]
    return false;
  const std::int64_t item_size = item_size_of(*type), bytes = count * item_size;
  const bool writes_grad = update.writes_grad;
  char* stream[kStreams];
  c10::StorageImpl* storage[kStreams];
#pragma GCC unroll 8
  for (int s = 0; s < kStreams; ++s) {
    const c10::TensorImpl& tensor = *subject.tensor[s];
    if (tensor.key_set().raw_repr() != plain_keys_ || !tensor.is_contiguous()) [[unlikely]] {
      return false;
    }
    if (s != kParam && (tensor.dtype() != dtype || !same_sizes(tensor.sizes(), sizes)))
        [[unlikely]] {
      return false;
    }
    storage[s] = tensor.unsafe_storage().unsafeGetStorageImpl();
    const std::int64_t offset = tensor.storage_offset() * item_size;
    if (static_cast<std::int64_t>(storage[s]->nbytes()) < offset + bytes) [[unlikely]]
      return false;
    stream[s] = data_of(*storage[s], s != kGrad || writes_grad) + offset;
#pragma GCC unroll 8
    for (int t = 0; t < s; ++t) {
      if (stream[s] < stream[t] + bytes && stream[t] < stream[s] + bytes) [[unlikely]]
        return false;
    }
  }

  Run& run = runs_[used_];
  Owner* owners = &owners_[owners_used_];
  bool moved = (run.streams != kStreams) | (run.writes_grad != writes_grad);
#pragma GCC unroll 8
  for (int s = 0; s < kStreams; ++s) {
    moved |= (run.stream[s] != stream[s]) | (owners[s].bytes != bytes);
    run.stream[s] = stream[s];
    owners[s].tensor = subject.tensor[s];
    owners[s].storage = storage[s];
    owners[s].bytes = bytes;
  }
  run.count = count;
  run.streams = kStreams;
  run.writes_grad = writes_grad;
  moved_ |= moved;
  count_in(update, update.kernels[static_cast<int>(*type)], nullptr, static_cast<int>(item_size),
           kStreams);
  return true;
}

template bool Plan::add_usual<2>(const Update&, const Subject&);
template bool Plan::add_usual<3>(const Update&, const Subject&);

bool Plan::add_unusual(const Update& update, const Place& place, Subject& subject,
                       at::Tensor* created) {
  reserve();
  if (!check_kinds(place, *update.rule, subject, update.writes_grad)) return false;
  const c10::TensorImpl& param = *subject.tensor[kParam];
  for (int s = kState; s < subject.streams; ++s) {
    if (subject.tensor[s] != nullptr) continue;
    created[s - kState] =
        new_state(update.state_like, *subject.tensor[kParam], *subject.tensor[kGrad]);
    subject.tensor[s] = created[s - kState].unsafeGetTensorImpl();
  }
  const std::int64_t count = param.numel();
  if (count == 0) return true;

  bool flat = true;
  for (int s = kGrad; s < subject.streams; ++s) flat &= same_layout(param, *subject.tensor[s]);
  if (layouts_used_ == layouts_.size()) layouts_.emplace_back();
  Layout& layout = layouts_[layouts_used_];
  if (!flat && !lay_out(update, place, subject, layout)) return false;

  const std::int16_t item_size = item_size_of(*storage_type(param));
  Run& run = runs_[used_];
  Owner* owners = &owners_[owners_used_];
  run.count = count;
  run.streams = subject.streams;
  run.writes_grad = update.writes_grad;
  for (int s = 0; s < subject.streams; ++s) {
    c10::TensorImpl& tensor = *subject.tensor[s];
    c10::StorageImpl* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
    const std::int64_t bytes = (flat ? count : layout.extent(s)) * item_size;
    const std::int64_t offset = tensor.storage_offset() * item_size;
    if (static_cast<std::int64_t>(storage->nbytes()) < offset + bytes) {
      storage_too_small(place, *update.rule, s, tensor);
    }
    run.stream[s] = data_of(*storage, written(update, s)) + offset;
    owners[s] = {&tensor, storage, bytes};
    // Streams of one parameter that share memory: only stock's order of passes gives its result.
    for (int t = 0; t < s; ++t) {
      if (run.stream[s] < run.stream[t] + owners[t].bytes &&
          run.stream[t] < run.stream[s] + bytes) {
        return false;
      }
    }
  }
  if (!flat) ++layouts_used_;
  count_in(update, update.kernels[static_cast<int>(*storage_type(param))], flat ? nullptr : &layout,
           item_size, subject.streams);
  return true;
}

// Finds the one order in which to visit streams that are laid out differently, and checks that what
// is written is written once. False for stock's path.
bool Plan::lay_out(const Update& update, const Place& place, const Subject& subject,
                   Layout& layout) {
  const c10::TensorImpl& param = *subject.tensor[kParam];
  if (param.dim() > kMaxDims) return false;
  layout.dims = static_cast<int>(param.dim());
  for (int d = 0; d < layout.dims; ++d) {
    layout.size[d] = param.sizes()[d];
    for (int s = 0; s < subject.streams; ++s) layout.stride[d][s] = subject.tensor[s]->strides()[d];
  }
  layout.simplify(subject.streams);
  for (int s = 0; s < subject.streams; ++s) {
    if (!written(update, s)) continue;
    for (int d = 0; d < layout.dims; ++d) {
      if (layout.stride[d][s] == 0) written_but_expanded(place, *update.rule, s);
    }
    if (!layout.injective(s)) return false;
  }
  return true;
}

bool Plan::add_zero(const at::Tensor& grad) {
  c10::TensorImpl& tensor = *grad.unsafeGetTensorImpl();
  if (tensor.key_set().raw_repr() != plain_keys_ || !tensor.is_non_overlapping_and_dense()) {
    return false;
  }
  if (tensor.numel() == 0) return true;
  c10::StorageImpl* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
  const auto item_size = static_cast<std::int64_t>(tensor.itemsize());
  const std::int64_t offset = tensor.storage_offset() * item_size,
                     bytes = tensor.numel() * item_size;
  if (static_cast<std::int64_t>(storage->nbytes()) < offset + bytes) return false;
  if (rows_.empty()) rows_.emplace_back();
  reserve();
  runs_[used_].stream[kParam] = static_cast<char*>(storage->mutable_data()) + offset;
  runs_[used_].count = bytes;
  runs_[used_].streams = 1;
  owners_[owners_used_] = {&tensor, storage, bytes};
  count_in({nullptr, nullptr, 0, false}, zero, nullptr, 1, 1);
  return true;
}

// --- running ------------------------------------------------------------------------------------

void Plan::collect_ranges() {
  writes_.clear();
  reads_.clear();
  const Owner* owner = owners_.data();
  for (std::size_t i = 0; i < used_; ++i) {
    for (int s = 0; s < runs_[i].streams; ++s, ++owner) {
      const auto begin = reinterpret_cast<std::uintptr_t>(runs_[i].stream[s]);
      const Range range{begin, begin + static_cast<std::uintptr_t>(owner->bytes)};
      (s != kGrad || runs_[i].writes_grad ? writes_ : reads_).push_back(range);
    }
  }
}

bool Plan::ordered() {
  if (moved_ || used_ != ordered_for_) {
    collect_ranges();
    ordered_ = any_meet(writes_, reads_);
    ordered_for_ = used_;
    moved_ = false;
  }
  return ordered_;
}

bool Plan::meets(std::vector<Range>& others) {
  collect_ranges();
  merge(others);
  return any_meet(others, writes_) || any_meet(others, reads_);
}

void Plan::retain(std::size_t first_owner, int streams) {
  for (int s = 0; s < streams; ++s) {
    const Owner& owner = owners_[first_owner + static_cast<std::size_t>(s)];
    retained_.push_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(owner.tensor));
    storages_.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(owner.storage));
  }
}

void Plan::retain() {
  if (retaining_) return;
  retaining_ = true;
  retain(0, static_cast<int>(owners_used_));
}

void Plan::retain_storages() {
  for (std::size_t i = 0; i < owners_used_; ++i) {
    storages_.push_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(owners_[i].storage));
  }
}

void Plan::release() {
  retaining_ = false;
  retained_.clear();
  storages_.clear();
}

void Plan::run(bool needs_order) {
  for (std::size_t i = 0; i < written_used_; ++i) written_[i]->bump_version();
  const bool in_order = needs_order && ordered();
  const bool without_gil = bytes_ >= kWorthTheGil;
  if (without_gil && !retaining_) retain_storages();  // kernels know nothing but their memory
  {
    const WithoutGil guard(without_gil);
    execute(spans_, runs_.data(), rows_.data(), bytes_, in_order);
  }
  release();
}

}  // namespace fastsgd
