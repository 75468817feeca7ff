#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bind/dlpack.hpp"
#include "bind/register.hpp"
#include "bind/view.hpp"
#include "core/error.hpp"

namespace xc::bind {

DType dtype_from(const std::string& name) {
  for (const DType t : kAllDTypes)
    if (name == name_of(t)) return t;
  throw UsageError("parameters must be float32, float64, bfloat16 or float16, not " + name);
}

namespace {

struct Export {
  dlpack::ManagedTensor managed;
  View view;
};

void drop_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kName)) return;  // consumed
  auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kName));
  managed->deleter(managed);
}

py::capsule to_dlpack(const View& view) {
  auto* out = new Export{{}, view};
  out->managed.tensor = {out->view.data.get(),
                         {out->view.place.type, out->view.place.index},
                         static_cast<int>(view.shape.size()),
                         dlpack::type_of(view.dtype),
                         out->view.shape.data(),
                         out->view.strides.data(),
                         0};
  out->managed.context = out;
  out->managed.deleter = [](dlpack::ManagedTensor* self) { delete static_cast<Export*>(self->context); };
  return py::reinterpret_steal<py::capsule>(PyCapsule_New(&out->managed, dlpack::kName, &drop_capsule));
}

std::string type_name(dlpack::DataType type) {
  for (const DType t : kAllDTypes)
    if (dlpack::type_of(t).code == type.code && dlpack::type_of(t).bits == type.bits && type.lanes == 1)
      return std::string(name_of(t));
  return "code " + std::to_string(type.code) + " with " + std::to_string(type.bits) + " bits";
}

// (address, dtype name, shape, strides in elements or None, device type, device number) of a capsule that
// stays unconsumed; valid while its producer lives.
py::tuple describe_dlpack(const py::capsule& capsule) {
  const auto* managed =
      static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kName));
  if (!managed) throw py::error_already_set();
  const dlpack::Tensor& t = managed->tensor;
  const std::vector<std::int64_t> shape(t.shape, t.shape + t.ndim);
  py::object strides = py::none();
  if (t.strides) strides = py::cast(std::vector<std::int64_t>(t.strides, t.strides + t.ndim));
  return py::make_tuple(reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset, type_name(t.dtype), shape,
                        strides, t.device.type, t.device.id);
}

py::buffer_info buffer_of(View& view) {
  if (view.place.type != dlpack::kCpu) throw py::buffer_error("a device's memory is no buffer; use DLPack");
  if (view.dtype == DType::bf16)
    throw py::buffer_error("NumPy has no bfloat16; use torch.from_dlpack, or view it as uint16");
  const auto size = size_of(view.dtype);
  std::vector<py::ssize_t> strides;
  for (const std::int64_t stride : view.strides) strides.push_back(stride * size);
  const char* format = view.dtype == DType::f32 ? "f" : view.dtype == DType::f64 ? "d" : "e";
  return {view.data.get(), size, format, static_cast<py::ssize_t>(view.shape.size()), view.shape, strides};
}

}  // namespace

void register_arrays(py::module_& module) {
  py::class_<View>(module, "View", py::buffer_protocol(),
                   "A look at shared memory; a buffer and a DLPack producer.")
      .def_buffer(&buffer_of)
      .def_property_readonly("address",
                             [](const View& v) { return reinterpret_cast<std::uintptr_t>(v.data.get()); })
      .def_property_readonly("dtype", [](const View& v) { return std::string(name_of(v.dtype)); })
      .def_readonly("shape", &View::shape)
      .def_readonly("strides", &View::strides)
      .def("as_bits",
           [](const View& v) {  // 16-bit elements as uint16, for NumPy
             if (size_of(v.dtype) != 2) throw UsageError("only 16-bit elements are seen as bits");
             std::vector<py::ssize_t> strides;
             for (const std::int64_t stride : v.strides) strides.push_back(2 * stride);
             return py::array(py::dtype("uint16"), v.shape, strides, v.data.get(), py::cast(v));
           })
      .def("__dlpack__", [](const View& v, const py::args&, const py::kwargs&) { return to_dlpack(v); })
      .def("__dlpack_device__", [](const View& v) { return py::make_tuple(v.place.type, v.place.index); });
  module.def("describe_dlpack", &describe_dlpack);
  const auto dtypes = [] {
    std::vector<std::string> names;
    for (const DType t : kAllDTypes) names.emplace_back(name_of(t));
    return names;
  };
  module.def("dtypes", dtypes);
}

}  // namespace xc::bind
