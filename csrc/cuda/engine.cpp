#include "cuda/engine.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace fastsgd::cuda {
namespace {

// A chunk is so long that there are this many blocks for each multiprocessor, within bounds: below,
// a block would cost more than its work; above, the last ones would run alone.
constexpr std::int64_t kBlocksEach = 16, kShortest = kThreads * 4, kLongest = kThreads * 64;

// How many of its elements are as much work as one of float32: bytes to be set to zero are little.
constexpr std::int64_t per_float(int kernel) {
  if (kernel == kZero) return 16;
  return kItemSizes[kernel % kStorages] < 4 ? 2 : 1;
}

// Cuts items into chunks. An empty item is one too, so that there is a block to count its step.
void cut_items(const std::vector<Item>& items, std::int64_t length, std::vector<Chunk>& chunks) {
  chunks.clear();
  for (std::size_t i = 0; i < items.size(); ++i) {
    std::int64_t begin = 0;
    do {
      const std::int64_t count = std::min(length, items[i].count - begin);
      chunks.push_back({static_cast<std::int32_t>(i), static_cast<std::int32_t>(count), begin});
      begin += length;
    } while (begin < items[i].count);
  }
}

}  // namespace

const void* Table::bring(Device& device, const void* bytes, std::size_t count) {
  if (count == 0) return nullptr;
  const std::int64_t stream = device.stream();
  if (capacity_ < count) {
    held_.clear();  // should this throw
    capacity_ = 0;
    memory_ = device.allocate(count + count / 2);
    capacity_ = count + count / 2;
  } else if (stream != stream_) {
    device.used(memory_);
  }
  stream_ = stream;
  if (held_.size() == count && std::memcmp(held_.data(), bytes, count) == 0) return memory_.get();
  held_.clear();  // likewise
  device.upload(memory_.get(), bytes, count);
  held_.assign(static_cast<const char*>(bytes), static_cast<const char*>(bytes) + count);
  return memory_.get();
}

Engine::Engine(std::unique_ptr<Device> device) : device_(std::move(device)) {}

Engine::~Engine() {
  if (!ever_captured()) return;
  set_aside();
  struct Rest {
    std::vector<Held> kept;
    std::vector<Table> hypers_kept;
    c10::DataPtr standing;
  };
  static auto& rests = *new std::vector<Rest>;
  rests.push_back({std::move(kept_), std::move(hypers_kept_), std::move(standing_)});
}

void Engine::set_aside() {
  for (Held& held : held_) kept_.push_back(std::exchange(held, {}));
  hypers_kept_.push_back(std::exchange(hypers_, {}));
}

Engine::Batch& Engine::batch_for(const Span& span) {
  const bool laid_out = span.layout != nullptr;
  for (std::size_t b = 0; b < used_; ++b) {
    const Launch& what = batches_[b].what;
    if (what.kernel == span.kernel && what.laid_out == laid_out) return batches_[b];
  }
  if (used_ == batches_.size()) {
    batches_.emplace_back();
    held_.emplace_back();
  }
  Batch& batch = batches_[used_++];
  batch.what = {span.kernel, laid_out, false, false, 0};
  batch.items.clear();
  batch.grads.clear();
  batch.layouts.clear();
  return batch;
}

void Engine::collect(const Work& work) {
  used_ = 0;
  std::size_t stepped = 0;
  for (const Span& span : work.spans) {
    Batch& batch = batch_for(span);
    for (std::int64_t r = span.first; r < span.end; ++r) {
      const Run& run = work.runs[r];
      Item item{};  // to the last byte, as items are compared by bytes
      std::copy_n(run.stream, span.streams, item.stream);
      char*& grad = item.stream[span.streams > kGrad ? kGrad : kParam];
      if (span.kernel != kZero) batch.grads.push_back(std::exchange(grad, nullptr));
      item.count = run.count;
      item.hypers = span.row;
      if (!work.counters.empty() && span.is_step()) {
        const Counters::Counter& counter = work.counters[stepped++];
        item.counter = counter.data;
        item.counter_is_double = counter.is_double;
      }
      if (span.layout != nullptr) {
        item.layout = static_cast<std::int32_t>(batch.layouts.size());
        batch.layouts.push_back(*span.layout);
      }
      batch.items.push_back(item);
    }
  }
}

// Cuts the items, unless they are as long as they were.
void Engine::cut(Batch& batch, bool measured) const {
  std::int64_t total = 0;
  bool as_before = batch.counts.size() == batch.items.size();
  for (std::size_t i = 0; i < batch.items.size(); ++i) {
    total += batch.items[i].count;
    as_before = as_before && batch.counts[i] == batch.items[i].count;
  }
  if (!as_before) {
    const std::int64_t share = total / (device_->processors() * kBlocksEach);
    const std::int64_t times = per_float(batch.what.kernel);
    const std::int64_t shortest = kShortest * times, longest = kLongest * times;
    const std::int64_t rounded = (share + shortest - 1) / shortest * shortest;
    cut_items(batch.items, std::clamp(rounded, shortest, longest), batch.chunks);
    batch.pieces.clear();
    batch.counts.clear();
    for (const Item& item : batch.items) batch.counts.push_back(item.count);
  }
  if (measured && batch.pieces.empty()) cut_items(batch.items, kPiece, batch.pieces);
}

void Engine::bring(Batch& batch, const Work& work) {
  Held& held = held_[static_cast<std::size_t>(&batch - batches_.data())];
  Tables& tables = batch.tables;
  tables = {};
  tables.items = held.items.bring(*device_, batch.items);
  tables.chunks = held.chunks.bring(*device_, batch.chunks);
  tables.layouts = held.layouts.bring(*device_, batch.layouts);
  const auto fits = [&](auto arguments) {
    using A = decltype(arguments);
    return work.hypers.size() <= A::kHypers && batch.grads.size() <= A::kGrads;
  };
  const Around& around = work.around;
  const bool any = around.before() || around.after() || work.measuring.clips;
  batch.what.around = batch.what.kernel != kZero && (any || !is_step(batch.what.kernel));
  batch.what.few = !batch.what.laid_out && !batch.what.around && fits(FewArguments{});
  if (work.hypers.size() > ManyArguments::kHypers)
    tables.hypers = hypers_.bring(*device_, work.hypers);
  if (batch.grads.size() > ManyArguments::kGrads)
    tables.grads = held.grads.bring(*device_, batch.grads);
  tables.item_count = static_cast<std::int32_t>(batch.items.size());
  tables.chunk_count = static_cast<std::int32_t>(batch.chunks.size());
  tables.last = &batch == &batches_[used_ - 1];
  tables.counts = (tables.last && work.averaged != nullptr) ||
                  std::any_of(batch.items.begin(), batch.items.end(),
                              [](const Item& item) { return item.counter != nullptr; });
  tables.grad_scale = work.grad_scale;
  tables.found_inf = work.found_inf;
  tables.averaged = work.averaged;
  tables.around = work.around;
  tables.measuring = work.measuring;
  tables.standing = standing();
  batch.what.blocks = static_cast<int>(batch.chunks.size());
}

void Engine::bring_standing() {
  if (standing_) return use_standing();
  static constexpr Standing kBefore;
  auto standing = device_->allocate(sizeof(kBefore));
  device_->upload(standing.get(), &kBefore, sizeof(kBefore));
  standing_ = std::move(standing);
  stream_ = device_->stream();
}

void Engine::use_standing() {
  const std::int64_t stream = device_->stream();
  if (stream != stream_) device_->used(standing_);
  stream_ = stream;
}

void Engine::prepare(const Work& work) {
  hypers_here_ = &work.hypers;
  // What a replay will read is not to be written by a later step, nor by another capture.
  const bool captures = device_->captures();
  if (captures || captured_) set_aside();
  captured_ = captures;
  device_->begin();
  bring_standing();
  collect(work);
  for (std::size_t b = 0; b < used_; ++b) {
    Batch& batch = batches_[b];
    const bool measured = work.measuring.any && has_grads(batch.what.kernel);
    cut(batch, measured);
    bring(batch, work);
    device_->prepare(batch.what);
    batch.pieces_there = nullptr;
    if (!measured) continue;
    batch.pieces_there = held_[b].pieces.bring(*device_, batch.pieces);
    device_->prepare(measuring(batch));
  }
}

// --- launching ----------------------------------------------------------------------------------

Launch Engine::measuring(const Batch& batch) const {
  Launch what = batch.what;
  what.kernel = measuring_kernel(batch.tables.measuring.order, what.kernel % kStorages);
  what.around = true;
  what.few = false;
  const auto most = static_cast<std::size_t>(device_->processors() * kBlocksEach);
  what.blocks = static_cast<int>(std::min(batch.pieces.size(), most));
  return what;
}

template <class A>
void Engine::launch_with(const Launch& what, const Tables& tables, const Batch& batch) {
  A arguments;
  arguments.tables = tables;
  if (tables.hypers == nullptr)
    std::copy(hypers_here_->begin(), hypers_here_->end(), arguments.hypers);
  if (tables.grads == nullptr) std::copy(batch.grads.begin(), batch.grads.end(), arguments.grads);
  device_->launch(what, &arguments);
}

void Engine::launch(const Launch& what, const Tables& tables, const Batch& batch) {
  what.few ? launch_with<FewArguments>(what, tables, batch)
           : launch_with<ManyArguments>(what, tables, batch);
}

void Engine::launch() {
  const auto measured = [](const Batch& batch) { return batch.pieces_there != nullptr; };
  std::size_t left = static_cast<std::size_t>(std::count_if(
      batches_.begin(), batches_.begin() + static_cast<std::ptrdiff_t>(used_), measured));
  for (std::size_t b = 0; b < used_; ++b) {
    const Batch& batch = batches_[b];
    if (!measured(batch)) continue;
    Tables tables = batch.tables;
    tables.chunks = batch.pieces_there;
    tables.chunk_count = static_cast<std::int32_t>(batch.pieces.size());
    tables.last = --left == 0;
    launch(measuring(batch), tables, batch);
  }
  for (std::size_t b = 0; b < used_; ++b) launch(batches_[b].what, batches_[b].tables, batches_[b]);
  device_->end();
}

}  // namespace fastsgd::cuda
