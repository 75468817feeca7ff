#include "nccl/api.hpp"

#include <dlfcn.h>

#include "core/error.hpp"

namespace xc {
namespace {

constexpr const char* kAdvice = "; XC_NCCL=/path/to/libnccl.so.2 names another library";

std::string needed() { return "NCCL " + nccl_version_text(kNcclOldest) + " or newer is needed"; }

template <class Signature>
void find(void* library, NcclFunction<Signature>& function) {
  function.at = reinterpret_cast<decltype(function.at)>(dlsym(library, function.name));
}

template <class... Functions>
void find_all(void* library, Functions&... functions) {
  (find(library, functions), ...);
}

// The first name of functions that were not found; null if none.
template <class... Functions>
const char* missing(const Functions&... functions) {
  const char* name = nullptr;
  ((name || functions ? void() : void(name = functions.name)), ...);
  return name;
}

// A name without a slash is first looked for among the libraries of the process.
void* open(const std::string& path) {
  const std::string name = path.empty() ? "libnccl.so.2" : path;
  if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  const char* why = dlerror();
  throw CommError("NCCL cannot be opened: " + std::string(why ? why : name) + ". " + needed() + kAdvice);
}

std::string file_of(const NcclApi& api, const std::string& path) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(api.get_version.at), &info) && info.dli_fname) return info.dli_fname;
  return path;
}

void require_version(NcclApi& api, const std::string& path) {
  if (!api.get_version || api.get_version(&api.version) != NcclResult::success)
    throw CommError((path.empty() ? "libnccl.so.2" : path) +
                    " is no NCCL: ncclGetVersion is missing or fails. " + needed() + kAdvice);
  api.path = file_of(api, path);
  if (api.version < kNcclOldest) throw CommError(api.name() + " is too old: " + needed() + kAdvice);
}

void find_required(void* library, NcclApi& api) {
  const auto find_and_name = [library](auto&... functions) {
    find_all(library, functions...);
    return missing(functions...);
  };
  const char* name =
      find_and_name(api.get_unique_id, api.comm_init, api.comm_state, api.comm_abort, api.comm_finalize,
                    api.comm_destroy, api.last_error, api.error_string, api.group_start, api.group_end,
                    api.send, api.receive, api.reduce_scatter, api.all_gather);
  if (name) throw CommError(api.name() + " has no " + name + ": " + needed() + kAdvice);
}

}  // namespace

NcclApi NcclApi::load(const std::string& path) {
  NcclApi api;
  void* library = open(path);
  find(library, api.get_version);
  require_version(api, path);
  find_required(library, api);
  find_all(library, api.mem_alloc, api.mem_free, api.window_register, api.window_deregister,
           api.peer_pointer);
  return api;
}

std::string NcclApi::name() const { return "NCCL " + nccl_version_text(version) + " (" + path + ")"; }

std::string NcclApi::words(const char* doing, NcclResult result) const {
  const char* last = last_error(nullptr);  // NCCL has one for all communicators
  const std::string details = last && *last ? ": " + std::string(last) : "";
  return std::string(doing) + " failed: " + error_string(result) + details + " [" + name() +
         "; NCCL_DEBUG=INFO makes it say more]";
}

std::string nccl_version_text(int version) {
  const int major = version < 10000 ? 1000 : 10000;  // the unit changed with 2.9
  return std::to_string(version / major) + "." + std::to_string(version % major / 100) + "." +
         std::to_string(version % 100);
}

}  // namespace xc
