#pragma once

namespace xc {

// Where work for a device queues up in order: a cudaStream_t. The host's own device ignores it.
using Stream = void*;

}  // namespace xc
