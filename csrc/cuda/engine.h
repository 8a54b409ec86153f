// Does the work of a plan on a device: one launch for each kernel that it needs, over tables that
// stay on the device for as long as they say the same.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "counters.h"
#include "cuda/device.h"
#include "cuda/table.h"
#include "work.h"

namespace fastsgd::cuda {

// The work of one step.
struct Work {
  const std::vector<Span>& spans;
  const Run* runs;
  const std::vector<Hypers>& hypers;            // what a span's row is the number of
  std::span<const Counters::Counter> counters;  // one a run that steps, or none
  const float *grad_scale = nullptr, *found_inf = nullptr;
  Around around{};
  Measuring measuring{};
  std::int64_t* averaged = nullptr;  // how many averages there were, on the device
};

// Bytes that the device holds a copy of.
class Table {
 public:
  // The device's copy, after bringing it these bytes if it holds others.
  template <class T>
  const T* bring(Device& device, const std::vector<T>& items) {
    return static_cast<const T*>(bring(device, items.data(), items.size() * sizeof(T)));
  }

 private:
  const void* bring(Device& device, const void* bytes, std::size_t count);

  c10::DataPtr memory_;
  std::size_t capacity_ = 0;
  std::int64_t stream_ = 0;  // that used it last
  std::vector<char> held_;
};

class Engine {
 public:
  explicit Engine(std::unique_ptr<Device> device);
  // What a graph reads is left to it: the graph may be replayed when the optimizer is gone.
  ~Engine();

  Device& device() { return *device_; }
  // Brings the device what it needs for the work. May throw; nothing of the step is done yet.
  void prepare(const Work& work);
  // Does what was prepared last.
  void launch();
  // Whether a step was ever captured.
  bool ever_captured() const { return captured_ || !kept_.empty(); }
  // On the device; null before the first work.
  Standing* standing() const { return static_cast<Standing*>(standing_.get()); }
  // Says that the current stream uses it, once it is there.
  void use_standing();

 private:
  // The work of one launch.
  struct Batch {
    Launch what{};
    std::vector<Item> items;
    std::vector<char*> grads;
    std::vector<Layout> layouts;
    std::vector<Chunk> chunks, pieces;  // the same items, cut to be stepped and to be measured
    std::vector<std::int64_t> counts;   // of the items that they are for
    Tables tables{};
    const Chunk* pieces_there = nullptr;
  };
  // What the device holds for the batches of one kernel.
  struct Held {
    Table items, chunks, pieces, layouts, grads;
  };

  // Keeps the tables as a graph reads them; those of the next step are others.
  void set_aside();
  Batch& batch_for(const Span& span);
  void collect(const Work& work);
  void cut(Batch& batch, bool measured) const;
  void bring(Batch& batch, const Work& work);
  void bring_standing();
  Launch measuring(const Batch& batch) const;
  void launch(const Launch& what, const Tables& tables, const Batch& batch);
  template <class A>
  void launch_with(const Launch& what, const Tables& tables, const Batch& batch);

  std::unique_ptr<Device> device_;
  std::vector<Batch> batches_;  // in the order in which the spans first need them
  std::size_t used_ = 0;        // this step's
  std::vector<Held> held_;
  Table hypers_;
  const std::vector<Hypers>* hypers_here_ = nullptr;
  c10::DataPtr standing_;
  std::int64_t stream_ = 0;  // that it was used on last
  std::vector<Held> kept_;   // what replays read: never written again
  std::vector<Table> hypers_kept_;
  bool captured_ = false;  // the last step
};

}  // namespace fastsgd::cuda
