// bindings.cpp — the core as a CPython extension module, tconv._C.
//
// Only the limited API of Python 3.10 (abi3), no PyTorch headers: one binary serves every Python from 3.10 and every
// PyTorch. Tensors cross as addresses; shapes cross once per layer and size, when a plan is made. What is called per
// convolution is `run`: about 0.5 us of argument parsing for 14 integers.
// SPDX-License-Identifier: Apache-2.0
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda/driver.h"
#include "kernel.h"
#include "tconv/tconv.h"

namespace {

using tconv::Plan;

// A Python exception is already set; unwinds to the entry point.
struct PythonError {};

struct Decref {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Object = std::unique_ptr<PyObject, Decref>;

Object checked(PyObject* object) {
  if (object == nullptr) throw PythonError{};
  return Object(object);
}

// Other Python threads run while the core plans, compiles or computes.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ~ReleaseGil() { PyEval_RestoreThread(state_); }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

// Every entry point runs in here: C++ exceptions become Python's. std::invalid_argument becomes `invalid`, which is
// RuntimeError for plans (what PyTorch raises for a bad argument of a functional) and ValueError for parsers.
template <class F>
PyObject* guarded(PyObject* invalid, F&& body) {
  try {
    return body();
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(invalid, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

void expect_arguments(const char* function, Py_ssize_t given, Py_ssize_t wanted) {
  if (given == wanted) return;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", function, wanted, given);
  throw PythonError{};
}

std::int64_t to_int(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError{};
  return value;
}

void* to_pointer(PyObject* object) {
  if (object == Py_None) return nullptr;
  void* value = PyLong_AsVoidPtr(object);
  if (value == nullptr && PyErr_Occurred()) throw PythonError{};
  return value;
}

std::string to_text(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw PythonError{};
  return {text, static_cast<std::size_t>(size)};
}

// A tuple of `rank` numbers, right-aligned into (depth, height, width).
tconv::Dims to_dims(PyObject* tuple, int rank, std::int64_t unused) {
  if (PyTuple_Size(tuple) != rank) {
    if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "expected a tuple of %d numbers", rank);
    throw PythonError{};
  }
  tconv::Dims dims{unused, unused, unused};
  for (int i = 0; i < rank; ++i) dims[3 - rank + i] = to_int(PyTuple_GetItem(tuple, i));
  return dims;
}

Object from_text(std::string_view text) {
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

Object from_dims(const tconv::Dims& dims, int rank) {
  Object tuple = checked(PyTuple_New(rank));
  for (int i = 0; i < rank; ++i) {
    if (PyTuple_SetItem(tuple.get(), i, checked(PyLong_FromLongLong(dims[3 - rank + i])).release()) < 0)
      throw PythonError{};
  }
  return tuple;
}

void put(const Object& dict, const char* key, Object value) {
  if (PyDict_SetItemString(dict.get(), key, value.get()) < 0) throw PythonError{};
}
void put(const Object& dict, const char* key, std::string_view value) { put(dict, key, from_text(value)); }
void put_int(const Object& dict, const char* key, std::int64_t value) {
  put(dict, key, checked(PyLong_FromLongLong(value)));
}
void put_float(const Object& dict, const char* key, double value) {
  put(dict, key, checked(PyFloat_FromDouble(value)));
}

template <class Range, class F>
Object to_list(const Range& range, F&& convert) {
  Object list = checked(PyList_New(0));
  for (const auto& item : range) {
    Object value = convert(item);
    if (PyList_Append(list.get(), value.get()) < 0) throw PythonError{};
  }
  return list;
}

// --- Plan
// -------------------------------------------------------------------------------------------------------------

struct PlanObject {
  PyObject_HEAD std::shared_ptr<const Plan>* plan;
};

PyTypeObject* plan_type = nullptr;

const Plan& plan_of(PyObject* object) {
  if (!Py_IS_TYPE(object, plan_type)) {
    PyErr_SetString(PyExc_TypeError, "expected a tconv._C.Plan");
    throw PythonError{};
  }
  return **reinterpret_cast<PlanObject*>(object)->plan;
}

PyObject* wrap(std::shared_ptr<const Plan> plan) {
  auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(plan_type, Py_tp_alloc));
  Object object = checked(allocate(plan_type, 0));
  reinterpret_cast<PlanObject*>(object.get())->plan = new std::shared_ptr<const Plan>(std::move(plan));
  return object.release();
}

void plan_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<PlanObject*>(self)->plan;
  auto release = reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free));
  release(self);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

PyObject* plan_workspace_bytes(PyObject* self, void*) {
  return guarded(PyExc_RuntimeError, [&] { return PyLong_FromSize_t(plan_of(self).workspace_bytes); });
}
PyObject* plan_microseconds(PyObject* self, void*) {
  return guarded(PyExc_RuntimeError, [&] { return PyFloat_FromDouble(plan_of(self).microseconds); });
}
PyObject* plan_output_size(PyObject* self, void*) {
  return guarded(PyExc_RuntimeError, [&] {
    const Plan& plan = plan_of(self);
    return from_dims(tconv::output_size(plan.problem), plan.problem.rank).release();
  });
}
PyObject* plan_num_statistics(PyObject* self, void*) {
  return guarded(PyExc_RuntimeError, [&] {
    const Plan& plan = plan_of(self);
    return PyLong_FromLongLong(tconv::num_statistics(plan.problem, plan.epilogue));
  });
}
std::string problem_string(const tconv::Problem& problem, const tconv::Epilogue& epilogue) {
  std::string text = to_string(problem);
  if (!epilogue.empty()) text += " | " + to_string(epilogue);
  return text;
}
PyObject* plan_problem(PyObject* self, void*) {
  return guarded(PyExc_RuntimeError, [&] {
    const Plan& plan = plan_of(self);
    return from_text(problem_string(plan.problem, plan.epilogue)).release();
  });
}
PyObject* plan_steps(PyObject* self, void*) {
  return guarded(PyExc_RuntimeError, [&] {
    return to_list(plan_of(self).steps,
                   [](const tconv::Step& step) {
                     Object dict = checked(PyDict_New());
                     put(dict, "kernel", step.kernel->name);
                     put(dict, "config", tconv::to_string(step.config));
                     put(dict, "problem", problem_string(step.problem, step.epilogue));
                     put_float(dict, "microseconds", step.microseconds);
                     return dict;
                   })
        .release();
  });
}
PyObject* plan_candidates(PyObject* self, void*) {
  return guarded(PyExc_RuntimeError, [&] {
    return to_list(plan_of(self).candidates,
                   [](const tconv::Candidate& candidate) {
                     Object dict = checked(PyDict_New());
                     put(dict, "kernel", candidate.kernel);
                     put(dict, "config", tconv::to_string(candidate.config));
                     put(dict, "refusal", candidate.fit.refusal);
                     put_float(dict, "microseconds", candidate.fit.microseconds);
                     put(dict, "chosen", checked(PyBool_FromLong(candidate.chosen)));
                     return dict;
                   })
        .release();
  });
}
PyObject* plan_explain(PyObject* self, PyObject*) {
  return guarded(PyExc_RuntimeError, [&] { return from_text(tconv::explain(plan_of(self))).release(); });
}
PyObject* plan_repr(PyObject* self) {
  return guarded(PyExc_RuntimeError, [&] {
    const Plan& plan = plan_of(self);
    return from_text("<tconv plan: " + problem_string(plan.problem, plan.epilogue) + ">").release();
  });
}

PyGetSetDef plan_getset[] = {
    {"workspace_bytes", plan_workspace_bytes, nullptr, "bytes of scratch memory that run() needs", nullptr},
    {"microseconds", plan_microseconds, nullptr, "predicted time", nullptr},
    {"output_size", plan_output_size, nullptr, "spatial size of the forward result", nullptr},
    {"num_statistics", plan_num_statistics, nullptr, "elements of mean and rstd; 0 without a norm", nullptr},
    {"problem", plan_problem, nullptr, "the problem string", nullptr},
    {"steps", plan_steps, nullptr, "what is launched, in order", nullptr},
    {"candidates", plan_candidates, nullptr, "every kernel with its price or its refusal", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyMethodDef plan_methods[] = {
    {"explain", plan_explain, METH_NOARGS,
     "One line per candidate kernel: chosen first, then by price, then refusals."},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot plan_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(plan_repr)},
    {Py_tp_getset, plan_getset},
    {Py_tp_methods, plan_methods},
    {Py_tp_doc, const_cast<char*>("Which kernels run for a problem. Made by plans() and plan_string(), run by run().")},
    {0, nullptr},
};
PyType_Spec plan_spec = {"tconv._C.Plan", sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                         plan_slots};

// --- Geometry
// ---------------------------------------------------------------------------------------------------------

// Appends `rank` numbers from an int or a sequence of one or `rank` ints. False: something else, which the caller then
// examines in Python (to convert it, or to refuse it by name). bool is refused as PyTorch refuses it.
bool append_numbers(PyObject* object, int rank, std::int64_t*& at) {
  if (PyLong_CheckExact(object)) {
    const std::int64_t value = to_int(object);
    for (int i = 0; i < rank; ++i) *at++ = value;
    return true;
  }
  const bool tuple = PyTuple_Check(object);
  if (!tuple && !PyList_Check(object)) return false;
  const Py_ssize_t size = tuple ? PyTuple_Size(object) : PyList_Size(object);
  if (size != rank && size != 1) return false;
  for (int i = 0; i < rank; ++i) {
    const Py_ssize_t from = size == 1 ? 0 : i;
    PyObject* item = tuple ? PyTuple_GetItem(object, from) : PyList_GetItem(object, from);
    if (!PyLong_CheckExact(item)) return false;
    *at++ = to_int(item);
  }
  return true;
}

// The geometry of a layer as one bytes object: a dictionary key that neither 1.0 nor True can imitate. None when an
// argument is not made of plain ints.
PyObject* geometry_key(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(PyExc_RuntimeError, [&]() -> PyObject* {
    expect_arguments("geometry_key", count, 6);
    const int rank = static_cast<int>(to_int(args[0]));
    if (rank < 1 || rank > 3) throw std::invalid_argument("rank must be 1, 2 or 3");
    std::array<std::int64_t, 14> numbers{};
    std::int64_t* at = numbers.data();
    *at++ = rank;
    const bool plain = append_numbers(args[1], rank, at) && append_numbers(args[2], rank, at) &&
                       append_numbers(args[3], rank, at) && append_numbers(args[4], 1, at) &&
                       PyLong_CheckExact(args[4]) && append_numbers(args[5], rank, at);
    if (!plain) {
      Py_INCREF(Py_None);
      return Py_None;
    }
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers.data()),
                                     (at - numbers.data()) * static_cast<Py_ssize_t>(sizeof(std::int64_t)));
  });
}

// --- Making plans
// -----------------------------------------------------------------------------------------------------

template <class Enum>
Enum to_enum(PyObject* object, int count, const char* name) {
  const std::int64_t value = to_int(object);
  if (value < 0 || value >= count) {
    PyErr_Format(PyExc_ValueError, "%s must be in [0, %d)", name, count);
    throw PythonError{};
  }
  return static_cast<Enum>(value);
}

std::optional<tconv::DType> to_optional_dtype(PyObject* object) {
  if (object == Py_None) return std::nullopt;
  return to_enum<tconv::DType>(object, 4, "dtype");
}

tconv::PlanRequest to_request(PyObject* tuple) {
  constexpr Py_ssize_t kCount = 21;
  if (!PyTuple_Check(tuple)) {
    PyErr_SetString(PyExc_TypeError, "plans takes a list of tuples");
    throw PythonError{};
  }
  expect_arguments("a plan", PyTuple_Size(tuple), kCount);
  std::array<PyObject*, kCount> args;
  for (Py_ssize_t i = 0; i < kCount; ++i) args[static_cast<std::size_t>(i)] = PyTuple_GetItem(tuple, i);
  tconv::PlanRequest request;
  tconv::Problem& problem = request.problem;
  problem.direction = to_enum<tconv::Direction>(args[0], 5, "direction");
  problem.rank = static_cast<int>(to_int(args[1]));
  if (problem.rank < 1 || problem.rank > 3) throw std::invalid_argument("rank must be 1, 2 or 3");
  const int rank = problem.rank;
  problem.batch = to_int(args[2]);
  problem.groups = to_int(args[3]);
  problem.in_channels = to_int(args[4]);
  problem.out_channels = to_int(args[5]);
  problem.input = to_dims(args[6], rank, 1);
  problem.kernel = to_dims(args[7], rank, 1);
  problem.stride = to_dims(args[8], rank, 1);
  problem.padding = to_dims(args[9], rank, 0);
  problem.output_padding = to_dims(args[10], rank, 0);
  problem.dilation = to_dims(args[11], rank, 1);
  problem.dtype = to_enum<tconv::DType>(args[12], 4, "dtype");
  problem.layout = to_enum<tconv::Layout>(args[13], 2, "layout");
  problem.precision = to_enum<tconv::Precision>(args[14], 2, "precision");
  const auto device = static_cast<int>(to_int(args[15]));
  request.device = device < 0 ? tconv::cpu_device() : tconv::cuda_device(device);
  tconv::Epilogue& epilogue = request.epilogue;
  epilogue = tconv::parse_epilogue(to_text(args[16]));
  epilogue.save = to_int(args[17]) != 0;
  epilogue.operand_dtype = to_optional_dtype(args[18]);
  epilogue.output_dtype = to_optional_dtype(args[19]);
  request.only = to_text(args[20]);
  return request;
}

PyObject* plans(PyObject*, PyObject* list) {
  return guarded(PyExc_RuntimeError, [&]() -> PyObject* {
    if (!PyList_Check(list)) {
      PyErr_SetString(PyExc_TypeError, "plans takes a list of tuples");
      throw PythonError{};
    }
    const Py_ssize_t count = PyList_Size(list);
    std::vector<tconv::PlanRequest> requests;
    for (Py_ssize_t i = 0; i < count; ++i) requests.push_back(to_request(PyList_GetItem(list, i)));
    std::vector<std::shared_ptr<const Plan>> made;
    {
      ReleaseGil released;
      made = tconv::plans(requests);
    }
    Object result = checked(PyList_New(0));
    for (auto& one : made) {
      const Object object = checked(wrap(std::move(one)));
      if (PyList_Append(result.get(), object.get()) < 0) throw PythonError{};
    }
    return result.release();
  });
}

// "cpu", "cuda", "cuda:1", or the name of a hand-written device: "h200", "cpu_avx2".
tconv::Device device_from(const std::string& name) {
  if (name == "cpu") return tconv::cpu_device();
  if (name == "cuda") return tconv::cuda_device(0);
  if (name.starts_with("cuda:")) return tconv::cuda_device(std::stoi(name.substr(5)));
  return tconv::known_device(name);
}

struct Described {
  tconv::Problem problem;
  tconv::Epilogue epilogue;
};

// "<problem>" or "<problem> | <epilogue>".
Described parse_described(const std::string& text) {
  const std::size_t bar = text.find('|');
  Described described;
  described.problem = tconv::parse_problem(std::string_view(text).substr(0, bar));
  if (bar != std::string::npos) described.epilogue = tconv::parse_epilogue(std::string_view(text).substr(bar + 1));
  return described;
}

PyObject* plan_string(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(PyExc_ValueError, [&]() -> PyObject* {
    expect_arguments("plan_string", count, 3);
    const std::string text = to_text(args[0]), device_name = to_text(args[1]), only = to_text(args[2]);
    std::shared_ptr<const Plan> made;
    {
      ReleaseGil released;
      const Described described = parse_described(text);
      made = tconv::plan(described.problem, described.epilogue, device_from(device_name), only);
    }
    return wrap(std::move(made));
  });
}

PyObject* parse_problem(PyObject*, PyObject* argument) {
  return guarded(PyExc_ValueError, [&]() -> PyObject* {
    const Described described = parse_described(to_text(argument));
    const tconv::Problem& p = described.problem;
    Object dict = checked(PyDict_New());
    put_int(dict, "rank", p.rank);
    put_int(dict, "batch", p.batch);
    put_int(dict, "groups", p.groups);
    put_int(dict, "in_channels", p.in_channels);
    put_int(dict, "out_channels", p.out_channels);
    put(dict, "input", from_dims(p.input, p.rank));
    put(dict, "kernel", from_dims(p.kernel, p.rank));
    put(dict, "stride", from_dims(p.stride, p.rank));
    put(dict, "padding", from_dims(p.padding, p.rank));
    put(dict, "output_padding", from_dims(p.output_padding, p.rank));
    put(dict, "dilation", from_dims(p.dilation, p.rank));
    put(dict, "output", from_dims(tconv::output_size(p), p.rank));
    put(dict, "dtype", to_string(p.dtype));
    put(dict, "layout", to_string(p.layout));
    put(dict, "direction", to_string(p.direction));
    put(dict, "precision", to_string(p.precision));
    put(dict, "epilogue", described.epilogue.empty() ? std::string() : to_string(described.epilogue));
    put(dict, "bias", checked(PyBool_FromLong(described.epilogue.bias)));
    put_float(dict, "flops", tconv::useful_flops(p));
    put_float(dict, "bytes", tconv::minimum_bytes(p));
    put(dict, "text", problem_string(p, described.epilogue));
    return dict.release();
  });
}

// --- Running
// ----------------------------------------------------------------------------------------------------------

template <class Pointer>
void fill_operands(PyObject* object, std::array<Pointer, tconv::kMaxOperands>& slots) {
  if (object == Py_None) return;
  const Py_ssize_t size = PyTuple_Size(object);
  if (size < 0) throw PythonError{};
  if (size > tconv::kMaxOperands) throw std::invalid_argument("too many operands");
  for (Py_ssize_t i = 0; i < size; ++i) slots[static_cast<std::size_t>(i)] = to_pointer(PyTuple_GetItem(object, i));
}

PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(PyExc_RuntimeError, [&]() -> PyObject* {
    expect_arguments("run", count, 16);
    const Plan& plan = plan_of(args[0]);
    tconv::Stream stream;
    stream.handle = to_pointer(args[1]);
    stream.num_threads = static_cast<int>(to_int(args[2]));
    tconv::Tensors tensors;
    tensors.input = to_pointer(args[3]);
    tensors.weight = to_pointer(args[4]);
    tensors.bias = to_pointer(args[5]);
    tensors.grad_output = to_pointer(args[6]);
    tensors.output = to_pointer(args[7]);
    tensors.grad_bias = to_pointer(args[8]);
    tensors.raw = to_pointer(args[9]);
    tensors.mean = to_pointer(args[10]);
    tensors.rstd = to_pointer(args[11]);
    tensors.workspace = to_pointer(args[12]);
    fill_operands(args[13], tensors.operands);
    fill_operands(args[14], tensors.grad_operands);
    tensors.weight_channels_last = to_int(args[15]) != 0;
    {
      ReleaseGil released;
      tconv::execute(plan, tensors, stream);
    }
    Py_INCREF(Py_None);
    return Py_None;
  });
}

// --- The rest
// ---------------------------------------------------------------------------------------------------------

PyObject* compile(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded(PyExc_ValueError, [&]() -> PyObject* {
    expect_arguments("compile", count, 2);
    const std::string text = to_text(args[0]), device_name = to_text(args[1]);
    struct Built {
      std::string kernel, source, entry;
      tconv::cuda::BuildReport report;
    };
    std::vector<Built> built;
    {
      ReleaseGil released;
      const Described described = parse_described(text);
      const tconv::Device device = device_from(device_name);
      if (device.backend != tconv::Backend::cuda)
        throw std::invalid_argument("device must be a CUDA device, got " + device_name);
      const std::string arch = tconv::cuda::arch_of(device);
      const auto plan = tconv::plan(described.problem, described.epilogue, device);
      for (const tconv::Step& step : plan->steps) {
        if (step.kernel->units == nullptr) continue;
        for (const tconv::Unit& unit : step.kernel->units(step)) {
          Built entry{std::string(step.kernel->name), unit.source, unit.entry, {}};
          tconv::cuda::compile(unit, arch, &entry.report);
          built.push_back(std::move(entry));
        }
      }
    }
    return to_list(built,
                   [](const Built& entry) {
                     Object dict = checked(PyDict_New());
                     put(dict, "kernel", entry.kernel);
                     put(dict, "source", entry.source);
                     put(dict, "entry", entry.entry);
                     put_int(dict, "registers", entry.report.registers);
                     put_int(dict, "spill_bytes", static_cast<std::int64_t>(entry.report.spill_bytes));
                     put_float(dict, "seconds", entry.report.seconds);
                     put(dict, "from_cache", checked(PyBool_FromLong(entry.report.from_cache)));
                     return dict;
                   })
        .release();
  });
}

PyObject* device_info(PyObject*, PyObject* argument) {
  return guarded(PyExc_ValueError, [&]() -> PyObject* {
    const tconv::Device device = device_from(to_text(argument));
    Object dict = checked(PyDict_New());
    put(dict, "backend", device.backend == tconv::Backend::cuda ? "cuda" : "cpu");
    put(dict, "name", device.name);
    put_float(dict, "bandwidth_tbs", device.bandwidth_tbs);
    put_float(dict, "fp32_tflops", device.fp32_tflops);
    put_float(dict, "tf32_tflops", device.tf32_tflops);
    put_float(dict, "f16_tflops", device.f16_tflops);
    put(dict, "isa",
        device.isa == tconv::Isa::avx512_amx    ? "avx512_amx"
        : device.isa == tconv::Isa::avx512_bf16 ? "avx512_bf16"
        : device.isa == tconv::Isa::avx512      ? "avx512"
        : device.isa == tconv::Isa::avx2        ? "avx2"
                                                : "portable");
    put_int(dict, "cores", device.cores);
    put_int(dict, "compute_capability", device.compute_capability);
    put_int(dict, "multiprocessors", device.multiprocessors);
    return dict.release();
  });
}

PyObject* cuda_device_count(PyObject*, PyObject*) { return PyLong_FromLong(tconv::cuda_device_count()); }

PyObject* kernel_names(PyObject*, PyObject* argument) {
  return guarded(PyExc_ValueError, [&]() -> PyObject* {
    const std::string backend = to_text(argument);
    if (backend != "cpu" && backend != "cuda")
      throw std::invalid_argument("backend must be cpu or cuda, got " + backend);
    return to_list(tconv::kernel_names(backend == "cpu" ? tconv::Backend::cpu : tconv::Backend::cuda),
                   [](const std::string& name) { return from_text(name); })
        .release();
  });
}

// One dictionary per line of epilogue.def, so that the Python names are checked against the core's.
PyObject* operations(PyObject*, PyObject*) {
  return guarded(PyExc_RuntimeError, [&]() -> PyObject* {
    static constexpr tconv::OpKind kKinds[] = {
#define POINTWISE(name, ...) tconv::OpKind::name,
#define NORM(name, ...) tconv::OpKind::name,
#include "tconv/epilogue.def"
    };
    return to_list(kKinds,
                   [](tconv::OpKind kind) {
                     Object dict = checked(PyDict_New());
                     put(dict, "name", tconv::to_string(kind));
                     put(dict, "norm", checked(PyBool_FromLong(tconv::is_norm(kind))));
                     const tconv::OperandKind operand = tconv::operand_kind(kind);
                     put(dict, "operand",
                         operand == tconv::OperandKind::channel  ? "channel"
                         : operand == tconv::OperandKind::tensor ? "tensor"
                                                                 : "none");
                     put_int(dict, "scalars", tconv::num_scalars(kind));
                     return dict;
                   })
        .release();
  });
}

PyObject* forget_functions(PyObject*, PyObject*) {
  return guarded(PyExc_RuntimeError, []() -> PyObject* {
    tconv::clear_plan_cache();
    tconv::cuda::forget_functions();
    Py_INCREF(Py_None);
    return Py_None;
  });
}

PyObject* add_search_path(PyObject*, PyObject* argument) {
  return guarded(PyExc_ValueError, [&]() -> PyObject* {
    tconv::cuda::add_search_path(to_text(argument));
    Py_INCREF(Py_None);
    return Py_None;
  });
}

template <class F>
PyCFunction as_method(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"geometry_key", as_method(geometry_key), METH_FASTCALL,
     "geometry_key(rank, stride, padding, output_padding, groups, dilation) -> bytes, or None if not plain ints"},
    {"plans", plans, METH_O,
     "plans(list of (direction, rank, batch, groups, in_channels, out_channels, input, kernel, stride, padding, "
     "output_padding, dilation, dtype, layout, precision, device, epilogue, save, operand_dtype, output_dtype, only)) "
     "-> list of Plan; what they have to compile is compiled at the same time"},
    {"plan_string", as_method(plan_string), METH_FASTCALL, "plan_string(problem, device, only) -> Plan"},
    {"parse_problem", parse_problem, METH_O, "parse_problem(text) -> dict"},
    {"run", as_method(run), METH_FASTCALL,
     "run(plan, stream, num_threads, input, weight, bias, grad_output, output, grad_bias, raw, mean, rstd, workspace, "
     "operands, grad_operands, weight_channels_last); tensors are addresses or None"},
    {"compile", as_method(compile), METH_FASTCALL, "compile(problem, device) -> list of build reports"},
    {"device_info", device_info, METH_O, "device_info(name) -> dict"},
    {"cuda_device_count", cuda_device_count, METH_NOARGS,
     "How many CUDA devices the driver shows; 0 without a driver."},
    {"kernel_names", kernel_names, METH_O, "kernel_names('cpu' or 'cuda') -> list of names, in the registry's order"},
    {"operations", operations, METH_NOARGS, "The operations of a fused chain, one dictionary each."},
    {"forget_functions", forget_functions, METH_NOARGS,
     "Forgets every plan and all device code that this process has loaded; plans that are in use keep theirs."},
    {"add_search_path", add_search_path, METH_O, "A folder where libnvrtc may lie."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    "tconv._C",
    "The core of tconv: plans and runs transposed convolutions on raw addresses.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* type = PyType_FromSpec(&plan_spec);
  if (type == nullptr) return nullptr;
  plan_type = reinterpret_cast<PyTypeObject*>(type);
  PyObject* module = PyModule_Create(&module_definition);
  if (module == nullptr) return nullptr;
  Py_INCREF(type);
  if (PyModule_AddObject(module, "Plan", type) < 0) {
    Py_DECREF(type);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
