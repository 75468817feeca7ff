#include <algorithm>
#include <cstdlib>

#include "check.hpp"
#include "nccl/api.hpp"

// The real library, where XC_NCCL names one: every declaration finds its function, and what needs no GPU
// works.

using namespace xc;

namespace {

constexpr int kSkipped = 77;

void every_function_is_there() {
  const NcclApi api = NcclApi::load(std::getenv("XC_NCCL"));
  CHECK(api.version >= kNcclOldest);
  CHECK(!!api.mem_alloc == (api.version >= api.mem_alloc.since));
  CHECK(!!api.mem_free == (api.version >= api.mem_free.since));
  CHECK(!!api.window_register == (api.version >= api.window_register.since));
  CHECK(!!api.window_deregister == (api.version >= api.window_deregister.since));
  CHECK(!!api.peer_pointer == (api.version >= api.peer_pointer.since));
  std::printf("%s has every function that is expected of it\n", api.name().c_str());
}

void an_id_can_be_had_without_a_gpu() {
  const NcclApi api = NcclApi::load(std::getenv("XC_NCCL"));
  NcclUniqueId id{};
  CHECK(api.get_unique_id(&id) == NcclResult::success);
  CHECK(std::any_of(std::begin(id.bytes), std::end(id.bytes), [](char byte) { return byte != 0; }));
}

}  // namespace

int main() {
  if (!std::getenv("XC_NCCL")) {
    std::printf("skipped: XC_NCCL names no libnccl.so.2\n");
    return kSkipped;
  }
  every_function_is_there();
  an_id_can_be_had_without_a_gpu();
}
