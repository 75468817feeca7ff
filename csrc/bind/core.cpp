#include "bind/register.hpp"

// extrapcomm._core: the engine and everything it stands on. There is no MPI in it; ranks find each other
// through a callback that Python gives.
PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled part of extrapcomm.";
  xc::bind::register_errors(module);
  xc::bind::register_arrays(module);
  xc::bind::register_stages(module);
  xc::bind::register_comm(module);
  xc::bind::register_gradients(module);
  xc::bind::register_engine(module);
}
