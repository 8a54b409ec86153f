#include "shards.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>

#include <cstring>

#include "pycall.h"

namespace fastsgd {
namespace {

// More than any model has parameters; where each backward makes new specs, they must not pile up.
constexpr std::size_t kMaxSpecs = 1 << 16;

PyObject* attribute(PyObject* object, const char* name) {
  return checked(PyObject_GetAttrString(object, name));
}

// A copy that says nothing of a dtype, which is the shards' own: an average may have another.
Ref without_dtype(PyObject* spec) {
  static auto& copy = *new PyCall("copy", "copy");
  Ref bare = copy(spec);
  const Ref meta = Ref::steal(attribute(spec, "tensor_meta"));
  if (meta.get() == Py_None) return bare;
  const Ref replace = Ref::steal(attribute(meta.get(), "_replace"));
  const Ref none = Ref::steal(checked(Py_BuildValue("{s:O}", "dtype", Py_None)));
  const Ref arguments = Ref::steal(checked(PyTuple_New(0)));
  const Ref changed =
      Ref::steal(checked(PyObject_Call(replace.get(), arguments.get(), none.get())));
  if (PyObject_SetAttrString(bare.get(), "tensor_meta", changed.get()) != 0) throw python_error();
  return bare;
}

}  // namespace

void LocalShards::learn(PyObject* object) {
  PyTypeObject* candidate = Py_TYPE(object);
  if (type != nullptr || std::strcmp(candidate->tp_name, "DTensor") != 0) return;
  const Ref module = Ref::steal(PyImport_ImportModule("torch.distributed.tensor"));
  const Ref known = Ref::steal(module ? PyObject_GetAttrString(module.get(), "DTensor") : nullptr);
  PyErr_Clear();
  if (known.get() != reinterpret_cast<PyObject*>(candidate)) return;
  local_slot = offset_of(candidate, "_local_tensor");
  spec_slot = offset_of(candidate, "_spec");
  if (local_slot == 0 || spec_slot == 0) return;
  Py_INCREF(candidate);
  type = candidate;
}

bool Shards::look(PyObject* const* streams, int count, Seen& seen) {
  seen = {};
  int kind = kMixed;
  bool all_known = true, all_alike = true;
  for (int i = 0; i < count; ++i) {
    PyObject* spec = LocalShards::spec(streams[i]);
    seen.stream[i] = {spec, LocalShards::shard(streams[i])};
    const auto known = kinds_.find(spec);
    if (known == kinds_.end()) {
      if (spec != nullptr) unknown_.push_back(Ref::borrow(spec));
      all_known = false;
      continue;
    }
    if (i == 0) kind = known->second.second;
    all_alike &= known->second.second == kind;
  }
  const bool alike = all_known && all_alike && kind != kMixed;
  seen.epoch = alike ? epoch_ : 0;
  return alike;
}

std::vector<at::Tensor>* Shards::made_for(PyObject* param, const Update& update,
                                          const Birth& birth) {
  const auto made = made_.find(param);
  if (made != made_.end() && static_cast<int>(made->second.size()) == update.structure->count) {
    return &made->second;
  }
  wanted_.push_back({Ref::borrow(param), update, birth});
  return nullptr;
}

int Shards::classify(PyObject* spec) {
  const Ref placements = Ref::steal(attribute(spec, "placements"));
  const Ref listed = Ref::steal(checked(PySequence_Fast(placements.get(), "placements")));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(listed.get()); ++i) {
    const Ref partial = Ref::steal(checked(
        PyObject_CallMethod(PySequence_Fast_GET_ITEM(listed.get(), i), "is_partial", nullptr)));
    if (is_true(partial.get())) return kMixed;
  }
  if (!kind_of_equal_) kind_of_equal_ = Ref::steal(checked(PyDict_New()));
  PyObject* kinds = kind_of_equal_.get();
  Ref kind = Ref::borrow(PyDict_GetItemWithError(kinds, spec));
  if (PyErr_Occurred()) throw python_error();
  if (!kind) {
    const Ref bare = without_dtype(spec);
    const Ref next = Ref::steal(checked(PyLong_FromSsize_t(PyDict_Size(kinds))));
    kind = Ref::borrow(checked(PyDict_SetDefault(kinds, bare.get(), next.get())));
    if (PyDict_SetItem(kinds, spec, kind.get()) != 0) throw python_error();
  }
  return static_cast<int>(PyLong_AsLong(kind.get()));
}

void Shards::answer() {
  if (kinds_.size() > kMaxSpecs) {
    ++epoch_;
    kinds_.clear();
    kind_of_equal_ = Ref();
  }
  for (Wanted& wanted : std::exchange(wanted_, {})) {
    const at::Tensor& param = tensor_of(wanted.param.get());
    const at::Tensor* grad = grad_slot(*param.unsafeGetTensorImpl());
    if (grad == nullptr || !grad->defined()) continue;
    std::vector<at::Tensor> made;
    const Structure& structure = *wanted.update.structure;
    for (int i = 0; i < structure.count; ++i) {
      at::Tensor state = i == structure.average ? new_average(wanted.update, param)
                         : wanted.birth.how == NewState::kFilled
                             ? at::full_like(param, wanted.birth.fill)
                             : at::empty_like(*grad);
      const Ref object = Ref::steal(checked(THPVariable_Wrap(state)));
      if (!LocalShards::is(object.get())) break;
      made.push_back(std::move(state));
      unknown_.push_back(Ref::borrow(LocalShards::spec(object.get())));
    }
    if (static_cast<int>(made.size()) != structure.count) continue;
    made_.insert_or_assign(wanted.param.get(), std::move(made));
  }
  for (const Ref& spec : std::exchange(unknown_, {})) {
    if (kinds_.count(spec.get()) != 0) continue;
    const int kind = classify(spec.get());
    kinds_.emplace(spec.get(), std::pair(Ref::borrow(spec.get()), kind));
  }
}

}  // namespace fastsgd
