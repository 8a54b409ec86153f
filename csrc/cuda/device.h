// What the engine asks of a device; the host can stand in for one.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda/table.h"

namespace fastsgd::cuda {

class Device {
 public:
  virtual ~Device() = default;

  // Whose tensors it takes.
  virtual c10::Device tensors() const = 0;
  // Multiprocessors: there should be several blocks for each.
  virtual int processors() const = 0;
  // Whether launches are recorded, to be run later and more than once. Memory that they use must
  // then keep what it holds.
  virtual bool captures() const = 0;

  // Memory that no one else writes, now or in a replay.
  virtual c10::DataPtr allocate(std::size_t bytes) = 0;
  // The stream of the next launch, by number.
  virtual std::int64_t stream() const = 0;
  // Says that the stream uses memory, which may have been made on another.
  virtual void used(const c10::DataPtr& memory) = 0;
  // Both are done once, before the next launch; they are not recorded.
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  virtual void zero(void* memory, std::size_t bytes) = 0;
  // A number on the device, when all that was asked of it is done.
  virtual std::int64_t read(const std::int64_t* there) = 0;

  // Makes sure that a launch will not fail for want of its code or of memory for that.
  virtual void prepare(const Launch& what) = 0;
  virtual void launch(const Launch& what, const void* arguments) = 0;
  // What is asked for from begin() to end() comes after all that was before, on whatever stream.
  virtual void begin() = 0;
  virtual void end() = 0;
};

// The host, on which plain CPU tensors stand for a device's. For tests: it runs the very tables
// that a device would get, and takes its time.
std::unique_ptr<Device> host_device();

}  // namespace fastsgd::cuda
