#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/dtype.hpp"

namespace xc::bind {

namespace py = pybind11;

// Each file of this folder binds one folder of the library.
void register_errors(py::module_& module);
void register_arrays(py::module_& module);
void register_stages(py::module_& module);
void register_comm(py::module_& module);
void register_gradients(py::module_& module);
void register_engine(py::module_& module);

DType dtype_from(const std::string& name);

}  // namespace xc::bind
