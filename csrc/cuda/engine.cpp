#include "cuda/engine.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace fastsgd::cuda {
namespace {

// A chunk is so long that there are this many blocks for each multiprocessor, within bounds: below,
// a block would cost more than its work; above, the last ones would run alone.
constexpr std::int64_t kBlocksEach = 16, kShortest = kThreads * 4, kLongest = kThreads * 64;
// The same of bytes to set to zero, which are less work than elements.
constexpr std::int64_t kZeroes = 16;

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
    c10::DataPtr ticket;
  };
  static auto& rests = *new std::vector<Rest>;
  rests.push_back({std::move(kept_), std::move(hypers_kept_), std::move(ticket_)});
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
  batch.what = {span.kernel, laid_out, false, 0};
  batch.items.clear();
  batch.grads.clear();
  batch.layouts.clear();
  return batch;
}

void Engine::collect(const Work& work) {
  used_ = 0;
  for (const Span& span : work.spans) {
    Batch& batch = batch_for(span);
    for (std::int64_t r = span.first; r < span.end; ++r) {
      const Run& run = work.runs[r];
      Item item{};  // to the last byte, as items are compared by bytes
      std::copy_n(run.stream, span.streams, item.stream);
      item.stream[kGrad] = nullptr;
      item.count = run.count;
      item.hypers = span.row;
      if (!work.counters.empty()) {
        const Counters::Counter& counter = work.counters[static_cast<std::size_t>(r)];
        item.counter = counter.data;
        item.counter_is_double = counter.is_double;
      }
      if (span.layout != nullptr) {
        item.layout = static_cast<std::int32_t>(batch.layouts.size());
        batch.layouts.push_back(*span.layout);
      }
      batch.items.push_back(item);
      if (span.kernel != kZero) batch.grads.push_back(run.stream[kGrad]);
    }
  }
}

// Cuts the items into chunks, unless they are as long as they were. An empty item is one chunk too,
// so that there is a block to count its step.
void Engine::cut(Batch& batch) const {
  std::int64_t total = 0;
  bool as_before = batch.counts.size() == batch.items.size();
  for (std::size_t i = 0; i < batch.items.size(); ++i) {
    total += batch.items[i].count;
    as_before = as_before && batch.counts[i] == batch.items[i].count;
  }
  if (as_before) return;
  const std::int64_t share = total / (device_->processors() * kBlocksEach);
  const std::int64_t times = batch.what.kernel == kZero ? kZeroes : 1, shortest = kShortest * times;
  const std::int64_t chunk =
      std::clamp((share + shortest - 1) / shortest * shortest, shortest, kLongest * times);
  batch.counts.clear();
  batch.chunks.clear();
  for (std::size_t i = 0; i < batch.items.size(); ++i) {
    const std::int64_t count = batch.items[i].count;
    std::int64_t begin = 0;
    do {
      batch.chunks.push_back({static_cast<std::int32_t>(i),
                              static_cast<std::int32_t>(std::min(chunk, count - begin)), begin});
      begin += chunk;
    } while (begin < count);
    batch.counts.push_back(count);
  }
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
  batch.what.few = !batch.what.laid_out && fits(FewArguments{});
  if (work.hypers.size() > ManyArguments::kHypers)
    tables.hypers = hypers_.bring(*device_, work.hypers);
  if (batch.grads.size() > ManyArguments::kGrads)
    tables.grads = held.grads.bring(*device_, batch.grads);
  tables.item_count = static_cast<std::int32_t>(batch.items.size());
  tables.counts = std::any_of(batch.items.begin(), batch.items.end(),
                              [](const Item& item) { return item.counter != nullptr; });
  tables.grad_scale = work.grad_scale;
  tables.found_inf = work.found_inf;
  tables.ticket = static_cast<unsigned*>(ticket_.get());
  batch.what.blocks = static_cast<int>(batch.chunks.size());
}

void Engine::prepare(const Work& work) {
  hypers_here_ = &work.hypers;
  // What a replay will read is not to be written by a later step, nor by another capture.
  const bool captures = device_->captures();
  if (captures || captured_) set_aside();
  captured_ = captures;
  if (!ticket_) {
    auto ticket = device_->allocate(sizeof(unsigned));
    device_->zero(ticket.get(), sizeof(unsigned));
    ticket_ = std::move(ticket);
    stream_ = device_->stream();
  } else if (device_->stream() != stream_) {
    stream_ = device_->stream();
    device_->used(ticket_);
  }
  collect(work);
  for (std::size_t b = 0; b < used_; ++b) {
    cut(batches_[b]);
    bring(batches_[b], work);
    device_->prepare(batches_[b].what);
  }
}

template <class A>
void Engine::launch(const Batch& batch) {
  A arguments;
  arguments.tables = batch.tables;
  if (batch.tables.hypers == nullptr)
    std::copy(hypers_here_->begin(), hypers_here_->end(), arguments.hypers);
  if (batch.tables.grads == nullptr)
    std::copy(batch.grads.begin(), batch.grads.end(), arguments.grads);
  device_->launch(batch.what, &arguments);
}

void Engine::launch() {
  for (std::size_t b = 0; b < used_; ++b) {
    const Batch& batch = batches_[b];
    batch.what.few ? launch<FewArguments>(batch) : launch<ManyArguments>(batch);
  }
}

}  // namespace fastsgd::cuda
