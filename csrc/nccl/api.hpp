#pragma once

#include <cstddef>
#include <string>

#include "device/stream.hpp"

namespace xc {

// NCCL without linking to it and without its header: a table of the functions that are used, found in a
// library that is opened when it is first wanted. So nothing here needs NCCL to be built, a machine without
// it loses nothing but NCCL, and a process that has a copy already, torch's, keeps to that one: two versions
// in one process are a known source of trouble.
//
// The declarations hold what NCCL's binary interface fixes: numbers of results and types, the bytes of an id,
// and the first fields of the configuration.
using NcclHandle = struct NcclCommunicatorOfTheLibrary*;
using NcclWindow = struct NcclWindowOfTheLibrary*;

enum class NcclResult : int { success = 0, in_progress = 7 };
enum class NcclType : int { uint8 = 1, float32 = 7 };
enum class NcclReduction : int { sum = 0 };

constexpr int kNcclOldest = 21403;         // as NCCL writes 2.14.3
constexpr int kNcclSymmetricWindow = 0x1;  // a flag of ncclCommWindowRegister

struct NcclUniqueId {
  char bytes[128];
};

// What a configuration was when it first came, in 2.14. A library reads as many bytes as the first field says
// and takes defaults for the fields that the named version did not have yet.
struct NcclConfig {
  std::size_t size = sizeof(NcclConfig);
  unsigned magic = 0xcafebeef;
  unsigned version = kNcclOldest;
  int blocking = 0;
};
static_assert(sizeof(NcclUniqueId) == 128 && sizeof(NcclConfig) == 24);

// One function of the library, and the version that it came with. False where the library has none.
template <class Signature>
struct NcclFunction;
template <class Result, class... Arguments>
struct NcclFunction<Result(Arguments...)> {
  const char* name;
  int since = kNcclOldest;
  Result (*at)(Arguments...) = nullptr;

  explicit operator bool() const { return at != nullptr; }
  Result operator()(Arguments... arguments) const { return at(arguments...); }
};

struct NcclApi {
  // Opens the library at `path`; if that is empty, the libnccl.so.2 that is in this process already, else the
  // one that the loader finds. It stays open: NCCL's threads outlive their communicators. CommError, naming
  // the library and its version, if there is none, if it is older than 2.14.3 or lacks a function.
  static NcclApi load(const std::string& path);

  std::string path;  // of the file that was opened
  int version = 0;

  NcclFunction<NcclResult(int*)> get_version{"ncclGetVersion"};
  NcclFunction<NcclResult(NcclUniqueId*)> get_unique_id{"ncclGetUniqueId"};
  NcclFunction<NcclResult(NcclHandle*, int, NcclUniqueId, int, NcclConfig*)> comm_init{
      "ncclCommInitRankConfig"};
  NcclFunction<NcclResult(NcclHandle, NcclResult*)> comm_state{"ncclCommGetAsyncError"};
  NcclFunction<NcclResult(NcclHandle)> comm_abort{"ncclCommAbort"};
  NcclFunction<NcclResult(NcclHandle)> comm_finalize{"ncclCommFinalize"};
  NcclFunction<NcclResult(NcclHandle)> comm_destroy{"ncclCommDestroy"};
  NcclFunction<const char*(NcclHandle)> last_error{"ncclGetLastError"};
  NcclFunction<const char*(NcclResult)> error_string{"ncclGetErrorString"};
  NcclFunction<NcclResult()> group_start{"ncclGroupStart"};
  NcclFunction<NcclResult()> group_end{"ncclGroupEnd"};
  NcclFunction<NcclResult(const void*, std::size_t, NcclType, int, NcclHandle, Stream)> send{"ncclSend"};
  NcclFunction<NcclResult(void*, std::size_t, NcclType, int, NcclHandle, Stream)> receive{"ncclRecv"};
  NcclFunction<NcclResult(const void*, void*, std::size_t, NcclType, NcclReduction, NcclHandle, Stream)>
      reduce_scatter{"ncclReduceScatter"};
  NcclFunction<NcclResult(const void*, void*, std::size_t, NcclType, NcclHandle, Stream)> all_gather{
      "ncclAllGather"};

  // What older libraries lack.
  NcclFunction<NcclResult(void**, std::size_t)> mem_alloc{"ncclMemAlloc", 21901};
  NcclFunction<NcclResult(void*)> mem_free{"ncclMemFree", 21901};
  NcclFunction<NcclResult(NcclHandle, void*, std::size_t, NcclWindow*, int)> window_register{
      "ncclCommWindowRegister", 22703};
  NcclFunction<NcclResult(NcclHandle, NcclWindow)> window_deregister{"ncclCommWindowDeregister", 22703};
  NcclFunction<NcclResult(NcclWindow, std::size_t, int, void**)> peer_pointer{"ncclGetPeerDevicePointer",
                                                                              22902};

  // "NCCL 2.30.7 (/usr/lib/libnccl.so.2)"
  std::string name() const;
  // NCCL's own words for a result that is no success.
  std::string words(const char* doing, NcclResult result) const;
};

// 23007 as "2.30.7".
std::string nccl_version_text(int version);

}  // namespace xc
