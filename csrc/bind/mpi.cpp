#include <pybind11/pybind11.h>

#include "wire/mpi_wire.hpp"

namespace py = pybind11;

// The wire between teams, a module for each MPI that it was built with. The class Wire is the core's.
PYBIND11_MODULE(XC_MPI_MODULE, module) {
  module.attr("compiled_for") = xc::mpi_compiled_for();
  module.attr("handle_size") = xc::mpi_handle_size();
  module.def(
      "wire",
      [](std::uintptr_t communicator, std::size_t largest) {
        return xc::make_mpi_wire(reinterpret_cast<const void*>(communicator), largest);
      },
      py::arg("communicator"), py::arg("largest"),
      "The wire over the communicator whose handle lies at that address.");
}
