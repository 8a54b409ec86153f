// The Python module fastsgd._C. The functions that a training loop calls are plain CPython
// functions: for a small model the cost of calling is the cost of a step.

#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/engine.h"
#include "cpu/team.h"
#include "cuda/devices.h"
#include "cuda/emulation.h"
#include "lists.h"
#include "modes.h"
#include "plain.h"
#include "pydict.h"
#include "pytensor.h"
#include "walkers.h"
#ifdef FASTSGD_COVERAGE
extern "C" void __gcov_dump();
#endif

namespace fastsgd {
namespace {

// The Python object that holds an optimizer's walkers.
struct WalkersObject {
  PyObject_HEAD Walkers* walkers;
};

void delete_holder(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<WalkersObject*>(self)->walkers;
  type->tp_free(self);
  Py_DECREF(type);
}

// Walkers are no state: their copy, deep or pickled, is None, and means that they are to be made.
PyObject* reduce_to_none(PyObject*, PyObject*) {
  return Py_BuildValue("(O())", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

PyTypeObject* holder_type() {
  static PyMethodDef methods[] = {{"__reduce__", reduce_to_none, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(delete_holder)},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  static PyType_Spec spec = {"fastsgd._C.Walkers", sizeof(WalkersObject), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  static PyObject* const type = PyType_FromSpec(&spec);
  return reinterpret_cast<PyTypeObject*>(type);
}

// The walkers of an optimizer, alive for as long as this is: made at the first call, kept among the
// optimizer's attributes. They are no state, so pickles and copies do without.
class WalkersOf {
 public:
  explicit WalkersOf(PyObject* optimizer) : optimizer_(optimizer) {
    // Never destroyed: that would be after the interpreter.
    static DictKey& key = *new DictKey("_fastsgd_walkers");
    const Ref attributes = Ref::steal(checked(PyObject_GenericGetDict(optimizer, nullptr)));
    PyObject* found = key.in(attributes.get());
    PyTypeObject* type = holder_type();
    if (found != nullptr && Py_TYPE(found) == type) {
      holder_ = Ref::borrow(found);
      return;
    }
    auto made = std::make_unique<Walkers>();
    holder_ = Ref::steal(checked(type->tp_alloc(type, 0)));
    reinterpret_cast<WalkersObject*>(holder_.get())->walkers = made.release();
    if (PyDict_SetItem(attributes.get(), key.name(), holder_.get()) != 0) throw python_error();
  }
  Walkers* operator->() const { return reinterpret_cast<WalkersObject*>(holder_.get())->walkers; }
  Walker& idle() const { return (*this)->idle(optimizer_); }

 private:
  PyObject* optimizer_;
  Ref holder_;
};

// Calls with memory that has run out as Python's MemoryError; torch would make a RuntimeError of it
// that says std::bad_alloc.
template <class Call>
PyObject* with_memory_errors(Call call) {
  HANDLE_TH_ERRORS
  try {
    return call();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  END_HANDLE_TH_ERRORS
}

PyObject* step(PyObject*, PyObject* optimizer) {
  return with_memory_errors([&]() -> PyObject* {
    const WalkersOf walkers(optimizer);
    Walker& walker = walkers.idle();
    walker.expect_no_other_try();
    if (walker.left_any() || !walker.unobserved(optimizer)) Py_RETURN_FALSE;
    const bool stepped = walker.step(optimizer);
    if (!stepped) walker.expect_another_try();
    return PyBool_FromLong(stepped);
  });
}

// A factor and a decay, or neither, that follow other arguments.
std::optional<Known> known_of(PyObject* const* arguments, Py_ssize_t count) {
  if (count == 0) return {};
  TORCH_CHECK_TYPE(count == 2, "takes a factor and a decay, or neither, after what is stepped");
  return Known{py::cast<double>(py::handle(arguments[0])),
               py::cast<std::optional<double>>(py::handle(arguments[1]))};
}

PyObject* step_or_route(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_memory_errors([&]() -> PyObject* {
    TORCH_CHECK_TYPE(count >= 1, "step_or_route takes an optimizer");
    const std::optional<Known> known = known_of(arguments + 1, count - 1);
    const WalkersOf walkers(arguments[0]);
    Walker& walker = walkers.idle();
    if (walker.step(arguments[0], known)) Py_RETURN_NONE;
    const Routes routes = walker.routes();  // making lists may run Python code, which may step
    return py::cast(routes).release().ptr();
  });
}

PyObject* step_rest(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_memory_errors([&] {
    TORCH_CHECK_TYPE(count >= 2, "step_rest takes an optimizer and routes");
    const auto taken = py::cast<Routes>(py::handle(arguments[1]));
    const std::optional<Known> known = known_of(arguments + 2, count - 2);
    const WalkersOf walkers(arguments[0]);
    return PyBool_FromLong(walkers.idle().step(arguments[0], known, &taken));
  });
}

PyObject* zero_grad(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return with_memory_errors([&]() -> PyObject* {
    TORCH_CHECK_TYPE(count == 3, "zero_grad takes an optimizer and two bools");
    const bool set_to_none = is_true(arguments[1]), observed = is_true(arguments[2]);
    if (!observed && at::hasCallbacks()) Py_RETURN_NONE;
    const Ref list = Ref::steal(checked(PyList_New(0)));
    const WalkersOf walkers(arguments[0]);
    std::vector<Ref> others;
    if (!walkers.idle().zero_grad(arguments[0], set_to_none, others)) Py_RETURN_NOTIMPLEMENTED;
    for (const Ref& other : others) {
      if (PyList_Append(list.get(), other.get()) != 0) throw python_error();
    }
    Py_INCREF(list.get());
    return list.get();
  });
}

// Of one optimizer: what its last steps found. Another may be under way.
py::object grad_norm(py::handle optimizer) {
  const at::Tensor norm = WalkersOf(optimizer.ptr())->grad_norm();
  return norm.defined() ? py::cast(norm) : py::none();
}
std::int64_t skipped_steps(py::handle optimizer) {
  return WalkersOf(optimizer.ptr())->skipped_steps();
}
double decay(py::handle optimizer) { return WalkersOf(optimizer.ptr())->decay(); }
void note(py::handle optimizer, const at::Tensor& norm, bool skipped) {
  WalkersOf(optimizer.ptr())->note(norm, skipped);
}

// As a table of methods has it.
PyCFunction fast_call(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"step", step, METH_O,
     "Step every parameter of an optimizer that has no hooks and is not profiled, and of which "
     "stock's path took none at the last step. Returns whether it did; where not, nothing was "
     "written."},
    {"step_or_route", fast_call(step_or_route), METH_FASTCALL,
     "Step every parameter of an optimizer and return None; or write nothing and return, for each "
     "group, the indices of the parameters that only stock's path can take. No groups: all. "
     "Groups without any: none, but Python must find the norm first and call again. If the factor "
     "of the gradients and the decay of averages (or None) are given, nothing else but clipping by "
     "value is done around the rule."},
    {"step_rest", fast_call(step_rest), METH_FASTCALL,
     "The same of every parameter but those that these routes name, which somebody else has "
     "stepped. Returns whether it did; where not, nothing was written."},
    {"zero_grad", fast_call(zero_grad), METH_FASTCALL,
     "Reset the gradients of an optimizer; return the parameters that are left to Python, as they "
     "or their gradients are of a class of their own. Does nothing and returns NotImplemented if "
     "the groups are kept in some way of their own, and None where someone profiles and is not "
     "`observed` to know it."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace fastsgd

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastsgd's fused steps.";
  fastsgd::watch_forks();
  // Learned now: at a step, a mode may be on that makes other tensors, and imports run Python code.
  fastsgd::plain();
  fastsgd::learn_dicts();
  fastsgd::learn_modes();
  fastsgd::Walker::learn_hooks();
  fastsgd::holder_type();
  if (PyModule_AddFunctions(module.ptr(), fastsgd::methods) != 0) throw py::error_already_set();
  module.def(
      "instruction_set", [] { return std::string(fastsgd::kernels().instruction_set); },
      "The instruction set of the kernels in use: 'baseline', 'avx2' or 'avx512'.");
  module.def(
      "is_plain",
      [](const at::Tensor& tensor) {
        return fastsgd::plain().type_of(*tensor.unsafeGetTensorImpl()) != fastsgd::kStorages;
      },
      "For tests: whether a tensor is what the kernels take without a closer look: dense, on the "
      "CPU and of a dtype that they know.");
  module.def(
      "emulate_device",
      [](bool on, bool captures) {
        fastsgd::cuda::emulate(on);
        fastsgd::cuda::emulated_work().captures = captures;
      },
      py::arg("on"), py::arg("captures") = false,
      "For tests: whether plain CPU tensors are stepped by the tables and code that other devices "
      "get, run on the host; and whether that says that a graph is being captured.");
  module.def(
      "emulated_work",
      [] {
        const auto& work = fastsgd::cuda::emulated_work();
        return std::tuple(work.launches, work.uploads, work.large, work.tables);
      },
      "For tests: how often kernels were launched on the host so far, and tables uploaded; and of "
      "the launches, those of steps alone with large arguments, and those with tables of what is "
      "too much for these.");
  module.def("has_kernels_for", &fastsgd::cuda::has_kernels_for,
             "Whether this build has kernels that run on a device.");
  module.def(
      "devices_of", [](const py::list& tensors) { return fastsgd::devices_of(tensors.ptr()); },
      "Where a list's tensors lie, each device once.");
  module.def("grad_norm", &fastsgd::grad_norm,
             "The total norm of the gradients at an optimizer's last step that measured it; None "
             "before.");
  module.def("skipped_steps", &fastsgd::skipped_steps, "How many steps an optimizer has skipped.");
  module.def("decay", &fastsgd::decay,
             "What an optimizer's schedule of ema_decay said when a step last asked it.");
  module.def(
      "note", &fastsgd::note,
      "Note the norm that Python has found for an optimizer, and whether it skips the step.");
  module.def(
      "norm_of",
      [](const py::list& tensors, bool of_grads, bool infinity) {
        auto norm = fastsgd::norm_of_all(tensors.ptr(), of_grads, infinity);
        return std::tuple(norm.value, norm.count, norm.any_double, std::move(norm.left));
      },
      "The norm of a list's tensors together, or of their grads, of order infinity (or 2) in "
      "double; how many there are; whether any is float64; and the numbers of those that were "
      "left out: not plain ones on the CPU.");
  module.def("clip_factor", &fastsgd::clip_factor,
             "What gradients of a norm, a float64 or else a float32, are multiplied by, as torch "
             "computes it.");
  module.def(
      "scale",
      [](const py::list& tensors, bool of_grads, double factor) {
        return fastsgd::scale_all(tensors.ptr(), of_grads, factor);
      },
      "Multiply a list's tensors, or their grads, in place; return the numbers of those left.");
  module.def(
      "clip_there",
      [](const py::list& tensors, double max_norm, bool infinity, bool raises) -> py::object {
        const auto norm = fastsgd::clip_there(tensors.ptr(), max_norm, infinity, raises);
        return norm.defined() ? py::cast(norm) : py::none();
      },
      "Clip the grads of a list by their norm, of order infinity (or 2), on the one device where "
      "all of them lie, unless that `raises` and is not finite. Returns the norm; None where they "
      "do not, and nothing was done.");
  module.def(
      "why_not_written",
      [](const at::Tensor& tensor) {
        return fastsgd::why_not_written(*tensor.unsafeGetTensorImpl());
      },
      "Why a tensor cannot be written, to follow its name; empty if nothing is known against it.");
  module.def(
      "why_not_zeroed", &fastsgd::why_not_zeroed,
      "Why a gradient cannot be cleared by zeros, to follow its name and go before the cure; "
      "empty if nothing is known against it.");
  module.def(
      "exchange", &fastsgd::exchange_all,
      "Exchange the contents of parameters and their averages; return the numbers of the pairs "
      "that were left.");
  module.def("threads", &fastsgd::threads, "How many threads a long step uses.");
#ifdef FASTSGD_COVERAGE
  module.def("write_coverage", &__gcov_dump, "Writes what was run: a forked process ends without.");
#endif
}
