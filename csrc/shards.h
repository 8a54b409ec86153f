// Distributed tensors (DTensor): each process holds a shard of one, a plain tensor. A step is
// elementwise, so that of the whole is that of each shard, as long as a parameter, its gradient and
// its states are sharded alike. Then no operator needs to be dispatched to know what to do.
#pragma once

#include <Python.h>

#include <unordered_map>
#include <utility>
#include <vector>

#include "prefetch.h"
#include "pydict.h"
#include "pytensor.h"
#include "rule.h"
#include "tensors.h"

namespace fastsgd {

// Tensors that are their own memory. (The same questions of shards: LocalShards.)
struct PlainTensors {
  static bool is(PyObject* object) { return exact_tensor(object); }
  static c10::TensorImpl* memory(PyObject* object) { return impl_of(object); }
};

// DTensors whose shard is a plain tensor.
struct LocalShards {
  [[gnu::always_inline]] static bool is(PyObject* object) {
    return is_distributed(object) && has_plain(object);
  }
  // Of a DTensor.
  static bool has_plain(PyObject* object) {
    return shard(object) != nullptr && exact_tensor(shard(object));
  }
  static c10::TensorImpl* memory(PyObject* object) { return impl_of(shard(object)); }

  // A DTensor, and no subclass. False until they are known, by learn().
  static bool is_distributed(PyObject* object) { return Py_TYPE(object) == type; }
  static PyObject* shard(PyObject* object) { return slot(object, local_slot); }
  // How it is sharded.
  static PyObject* spec(PyObject* object) { return slot(object, spec_slot); }

  // The part of an object that a plain tensor does not have.
  static FASTSGD_PREFETCHING void fetch(const void* object) { prefetch(object, local_slot); }

  static bool are_known() { return type != nullptr; }
  // Learns what a DTensor is, if this is one. May run Python code.
  static void learn(PyObject* object);

 private:
  static PyObject* slot(PyObject* object, Py_ssize_t offset) {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
  }
  static inline PyTypeObject* type = nullptr;  // kept for good
  static inline Py_ssize_t local_slot = 0, spec_slot = 0;
};

// What one optimizer knows of its DTensors.
class Shards {
 public:
  // A parameter's streams at the last step: their specs, all of them alike; and their shards, to be
  // fetched ahead of meeting them again.
  struct alignas(kCacheLine) Seen {
    std::uint64_t epoch = 0;
    struct Stream {
      PyObject* spec = nullptr;
      const void* shard = nullptr;
    } stream[kMaxStates + 2];
  };
  template <int kCount>
  static FASTSGD_PREFETCHING void fetch(const Seen& seen) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) prefetch(seen.stream[i].shard);
  }

  // Whether a parameter's streams are sharded alike, each element in one place. If that is not
  // known it is false, and noted to be asked.
  template <int kCount>
  [[gnu::always_inline]] bool alike(PyObject* const (&streams)[kCount], Seen& seen) {
    bool same = seen.epoch == epoch_;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      same &= seen.stream[i].spec == LocalShards::spec(streams[i]);
      PyObject* shard = LocalShards::shard(streams[i]);
      seen.stream[i].shard = shard;
    }
    if (same) [[likely]]
      return true;
    return look(streams, kCount, seen);
  }
  // The same, by what was asked.
  bool look(PyObject* const* streams, int count, Seen& seen);

  // New states for a parameter that were made for this step, DTensors all; null if there are none,
  // which is noted.
  std::vector<at::Tensor>* made_for(PyObject* param, const Update& update, const Birth& birth);

  // Whether anything was noted since the last answer; and answers it. May run Python code.
  bool asks() const { return !unknown_.empty() || !wanted_.empty(); }
  void answer();

  // Lets go of what a step has left.
  void end_step() {
    unknown_.clear();
    wanted_.clear();
    made_.clear();
  }

 private:
  struct Wanted {
    Ref param;
    Update update;
    Birth birth;
  };
  static constexpr int kMixed = -1;  // summed over processes, say: only DTensor's operators know

  int classify(PyObject* spec);

  std::uint64_t epoch_ = 1;  // of kinds_
  // Specs that are equal are of one kind. They are kept, so that an address says which it is.
  std::unordered_map<PyObject*, std::pair<Ref, int>> kinds_;
  Ref kind_of_equal_;  // a dict
  std::vector<Ref> unknown_;
  std::vector<Wanted> wanted_;
  std::unordered_map<PyObject*, std::vector<at::Tensor>> made_;
};

}  // namespace fastsgd
