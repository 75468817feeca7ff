#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "comm/wire.hpp"

namespace xc {

// The MPI that this code was compiled for, as its header names it, and the size of its communicator handle.
// Both tell one MPI's binary interface from another's.
std::string mpi_compiled_for();
std::size_t mpi_handle_size();

// The wire over a communicator, given by the address of its handle. The communicator must outlive the wire's
// use and be for it alone. Messages of more than `largest` bytes travel in several.
std::shared_ptr<Wire> make_mpi_wire(const void* communicator, std::size_t largest);

}  // namespace xc
