#include "bind/gradients.hpp"

#include <unistd.h>

#include <cstdint>
#include <utility>

#include "bind/register.hpp"
#include "core/error.hpp"
#include "device/device.hpp"

namespace xc::bind {
namespace {

// Memory that was mapped lies above this address, and so does the heap of a position-independent executable.
constexpr std::uintptr_t kLow = std::uintptr_t{1} << 40;

bool same_type(dlpack::DataType a, dlpack::DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

bool lies_on(const Device* device, dlpack::Device place) {
  const Device::Place wanted = device ? device->place() : Device::Place{dlpack::kCpu, 0};
  return place.type == wanted.type && place.id == wanted.index;
}

// The stride of a dimension of one element says nothing, and neither do those of an empty tensor.
bool same_layout(const dlpack::Tensor& tensor, const Layer& layer) {
  const auto& shape = layer.spec.shape;
  const auto& strides = layer.spec.strides;
  if (tensor.ndim != static_cast<std::int32_t>(shape.size())) return false;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (tensor.shape[d] != shape[d]) return false;
    if (layer.count > 0 && shape[d] > 1 && tensor.strides[d] != strides[d]) return false;
  }
  return true;
}

// Returns true if somebody beside the list holds its i-th tensor, which is not the gradient. The list holds
// one reference; an accessor of pybind11 would hold another.
bool is_held(const py::list& shown, std::size_t i, py::handle grad) {
  const PyObject* const tensor = PyList_GET_ITEM(shown.ptr(), static_cast<py::ssize_t>(i));
  return tensor != grad.ptr() && Py_REFCNT(const_cast<PyObject*>(tensor)) > 1;
}

py::object call(py::handle function, py::handle argument) {
  PyObject* const arguments[] = {argument.ptr()};
  auto answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(function.ptr(), arguments, 1, nullptr));
  if (!answer) throw py::error_already_set();
  return answer;
}

const dlpack::ExchangeTable* table_of(py::handle tensor_type) {
  if (!py::hasattr(tensor_type, dlpack::kExchangeAttribute)) return nullptr;
  const py::object capsule = tensor_type.attr(dlpack::kExchangeAttribute);
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeName)) return nullptr;
  const auto* table =
      static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeName));
  while (table && table->major > 1) table = table->older;
  return table && table->major == 1 && table->fill ? table : nullptr;
}

}  // namespace

std::vector<Engine::Source> sources_from(const Sources& sources, const Plan& plan) {
  const auto layers = static_cast<py::ssize_t>(plan.layers.size());
  if (sources.ndim() != 2 || sources.shape(0) != layers || sources.shape(1) != 2)
    throw UsageError("gather takes an address and a number of bytes for each layer");
  std::vector<Engine::Source> list;
  list.reserve(plan.layers.size());
  for (py::ssize_t i = 0; i < layers; ++i)
    list.push_back({reinterpret_cast<const std::byte*>(sources.at(i, 0)), sources.at(i, 1)});
  return list;
}

std::optional<GradientReader> GradientReader::make(const Engine& engine, const py::tuple& tensor_types) {
  const dlpack::ExchangeTable* table = table_of(tensor_types[0]);
  if (!table) return std::nullopt;
  return GradientReader(engine, *table, tensor_types);
}

py::tuple GradientReader::read(int v, const py::list& params, const py::list& shown, Sources& sources) const {
  const auto& layers = engine_->plan().layers;
  const std::size_t count = layers.size();
  if (params.size() != count || shown.size() != count || sources.size() != py::ssize_t(2 * count))
    throw UsageError("a gradient reader takes every parameter");
  const std::byte* const mine = engine_->gradients(v).get();
  const Memory memory = gradient_memory();
  std::int64_t* row = sources.mutable_data();
  py::list grads(layers.size());
  py::list odd;
  py::list held;
  for (std::size_t i = 0; i < layers.size(); ++i, row += 2) {
    const PyObject* const param = PyList_GET_ITEM(params.ptr(), static_cast<py::ssize_t>(i));
    auto grad =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(const_cast<PyObject*>(param), grad_.ptr()));
    if (!grad) throw py::error_already_set();
    Engine::Source source{nullptr, Engine::kAbsent};
    if (grad.is_none()) {
      if (is_held(shown, i, grad)) held.append(i);
    } else {
      const std::byte* const place = mine + layers[i].byte_begin;
      const auto found = plain(layers[i], grad, place, memory);
      if (!found) odd.append(i);
      if ((!found || found->address != place) && is_held(shown, i, grad)) held.append(i);
      source = found.value_or(source);
    }
    row[0] = reinterpret_cast<std::int64_t>(source.address);
    row[1] = source.bytes;
    PyList_SET_ITEM(grads.ptr(), static_cast<py::ssize_t>(i), grad.release().ptr());
  }
  return py::make_tuple(std::move(grads), std::move(odd), std::move(held));
}

py::list GradientReader::strays(int v, const py::list& tensors) const {
  const auto& layers = engine_->plan().layers;
  if (tensors.size() != layers.size()) throw UsageError("a gradient reader takes every parameter's tensor");
  const std::byte* const mine = engine_->gradients(v).get();
  const Memory memory = gradient_memory();
  py::list strays;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::byte* const place = mine + layers[i].byte_begin;
    const auto found = plain(layers[i], tensors[i], place, memory);
    if (!found || found->address != place) strays.append(i);
  }
  return strays;
}

bool GradientReader::unchanged(int v, const py::list& params, const py::list& versions,
                               std::int64_t writes) const {
  const auto& layers = engine_->plan().layers;
  if (params.size() != layers.size() || versions.size() != layers.size())
    throw UsageError("a gradient reader takes every parameter");
  const std::byte* const mine = engine_->weights(v).get();
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const py::handle param = PyList_GET_ITEM(params.ptr(), static_cast<py::ssize_t>(i));
    dlpack::Tensor tensor;
    if (table_->fill(param.ptr(), &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (!same_type(tensor.dtype, dlpack::type_of(layers[i].spec.dtype)) || !same_layout(tensor, layers[i]))
      return false;
    const auto* const at = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
    if (layers[i].count > 0 && at != mine + layers[i].byte_begin) return false;
    const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), version_.ptr()));
    if (!version) throw py::error_already_set();
    PyObject* const known = PyList_GET_ITEM(versions.ptr(), static_cast<py::ssize_t>(i));
    if (PyLong_AsLongLong(version.ptr()) != PyLong_AsLongLong(known) + writes) return false;
  }
  return true;
}

// All workers' G of this rank, and what lies between them.
GradientReader::Memory GradientReader::gradient_memory() const {
  const auto& layers = engine_->plan().layers;
  if (layers.empty()) return {nullptr, nullptr};
  const Layer& last = layers.back();
  const std::int64_t bytes = last.byte_begin + last.count * size_of(last.spec.dtype);
  const int workers = engine_->team().workers_per_rank();
  return {engine_->gradients(0).get(), engine_->gradients(workers - 1).get() + bytes};
}

std::optional<Engine::Source> GradientReader::plain(const Layer& layer, py::handle grad,
                                                    const std::byte* place, const Memory& memory) const {
  if (!has_plain_class(grad)) return std::nullopt;
  dlpack::Tensor tensor;
  if (table_->fill(grad.ptr(), &tensor) != 0) {
    PyErr_Clear();  // sparse, quantized, on a device without memory
    return std::nullopt;
  }
  if (!same_type(tensor.dtype, dlpack::type_of(layer.spec.dtype))) return std::nullopt;
  if (!lies_on(engine_->device(), tensor.device) || !same_layout(tensor, layer)) return std::nullopt;
  const std::int64_t bytes = layer.count * size_of(layer.spec.dtype);
  if (bytes == 0) return Engine::Source{place, 0};
  const auto* const from = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
  if (is_released(from, grad) || is_negated(grad)) return std::nullopt;
  if (from != place && from < memory.end && from + bytes > memory.begin) return std::nullopt;
  return Engine::Source{from, bytes};
}

bool GradientReader::has_plain_class(py::handle grad) const {
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(grad.ptr()));
  for (const py::handle plain : types_)
    if (type == plain.ptr()) return true;
  return false;
}

// The address of a tensor whose memory was released is its offset in that memory. Where the heap lies low, as
// it does in executables that are not position-independent, such a number could be an address too, unless the
// offset is 0.
bool GradientReader::is_released(const std::byte* address, py::handle grad) const {
  const auto number = reinterpret_cast<std::uintptr_t>(address);
  if (number >= kLow) return false;
  const bool heap_is_low = reinterpret_cast<std::uintptr_t>(sbrk(0)) < kLow;
  if (number == 0 || !heap_is_low) return true;
  if (call(storage_offset_, grad).cast<std::int64_t>() == 0) return false;
  return grad.attr("untyped_storage")().attr("data_ptr")().cast<std::uintptr_t>() == 0;
}

bool GradientReader::is_negated(py::handle grad) const { return call(is_neg_, grad).ptr() != Py_False; }

void register_gradients(py::module_& module) {
  py::class_<GradientReader>(module, "GradientReader", "Reads the gradients of an engine's parameters.")
      .def("read", &GradientReader::read, py::arg("worker"), py::arg("params"), py::arg("shown"),
           py::arg("sources").noconvert(),
           "(gradients, indices of the odd ones, indices of shown tensors that others hold and whose memory "
           "is "
           "written next); fills a row for each gradient that is not odd.")
      .def("strays", &GradientReader::strays, py::arg("worker"), py::arg("tensors"),
           "Indices of tensors that are not the worker's gradient memory as the parameters see it.")
      .def("unchanged", &GradientReader::unchanged, py::arg("worker"), py::arg("params"), py::arg("versions"),
           py::arg("writes"),
           "True if every parameter has its layer's form, lies where the worker's weights are, and has been "
           "written so many times since it had these versions.");
}

}  // namespace xc::bind
