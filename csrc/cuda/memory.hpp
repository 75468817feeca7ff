#pragma once

#include <cstddef>
#include <memory>

#include "comm/team.hpp"

namespace xc {

// Memory of the current GPU, zeroed.
std::shared_ptr<std::byte> allocate_device_memory(std::size_t bytes);

// The host's, where copies that are queued find it as it is then, and kernels may write.
std::shared_ptr<std::byte> allocate_mapped_memory(std::size_t bytes);

// Collective. Each rank's memory on its GPU, as this rank reaches it: its own, and the others' by the handles
// of CUDA's inter-process communication. It stays until all have closed it, whoever is first.
Shared share_device_memory(Team& team, std::size_t bytes);

}  // namespace xc
