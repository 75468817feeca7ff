#include <pybind11/pybind11.h>

#include "cuda/device.hpp"

namespace py = pybind11;

// GPUs, a module of its own beside the core. The class Device is the core's.
PYBIND11_MODULE(_cuda, module) {
  py::module_::import("extrapcomm._core");
  module.attr("architectures") = XC_CUDA_ARCHITECTURES;
  module.def("device_count", &xc::cuda_device_count);
  module.def("device", &xc::make_cuda_device, py::arg("index"), "The GPU with this number.");
  module.def("identify", &xc::identify_cuda_device, py::arg("index"));
  module.def("describe", &xc::describe_cuda_device, py::arg("index"));
}
