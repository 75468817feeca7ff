#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>

#include "state.hpp"

using namespace fake_cuda;

// ---- pages that processes share ----

namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kGrid = 256;  // on which memory begins

std::size_t round_up(std::size_t value, std::size_t grid) { return (value + grid - 1) / grid * grid; }

std::byte* map(int fd, std::size_t bytes, std::size_t from, void* at = nullptr) {
  void* const mapped = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | (at ? MAP_FIXED : 0), fd,
                            static_cast<off_t>(from));
  if (mapped == MAP_FAILED) misuse("no memory to be had");
  return static_cast<std::byte*>(mapped);
}

struct Handle {
  pid_t process;
  int fd;
  std::size_t bytes;
  std::uint64_t serial;
};

}  // namespace

// The data ends where its room does, so that whoever goes beyond meets the page behind it.
SharedPages::SharedPages(int fd, bool own, std::size_t bytes) : fd_(own ? fd : -1), bytes_(bytes) {
  const std::size_t room = round_up(bytes, kPage);
  front_ = map(fd, kPage, 0);
  room_ =
      static_cast<std::byte*>(mmap(nullptr, room + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  data_ = map(fd, room, kPage, room_ + kPage) + (room - round_up(bytes, kGrid));
}

// Its place stays empty for ever, so that whoever still uses it is found.
SharedPages::~SharedPages() {
  munmap(front_, kPage);
  mmap(room_, round_up(bytes_, kPage) + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (fd_ >= 0) close(fd_);
}

std::shared_ptr<SharedPages> SharedPages::make(std::size_t bytes) {
  static std::atomic<std::uint64_t> serials{1};
  const int fd = memfd_create("fake_cuda", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(kPage + round_up(bytes, kPage))) != 0)
    misuse("no memory to be had");
  std::shared_ptr<SharedPages> pages(new SharedPages(fd, true, bytes));
  pages->front().serial = ++serials;
  return pages;
}

void SharedPages::write_handle(char* handle) const {
  const Handle its{getpid(), fd_, bytes_, front().serial};
  static_assert(sizeof its <= 64);
  std::memcpy(handle, &its, sizeof its);
}

std::shared_ptr<SharedPages> SharedPages::open(const char* handle) {
  Handle its;
  std::memcpy(&its, handle, sizeof its);
  if (its.process == getpid()) return nullptr;
  const std::string path = "/proc/" + std::to_string(its.process) + "/fd/" + std::to_string(its.fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  std::shared_ptr<SharedPages> pages(new SharedPages(fd, false, its.bytes));
  ::close(fd);
  if (pages->front().serial != its.serial || pages->front().gone) return nullptr;
  ++pages->front().opened;
  return pages;
}

// ---- what is known of memory ----

namespace {

enum class Kind { device, opened, pinned, registered };

struct Piece {
  Kind kind;
  std::size_t bytes;
  int device;
  std::shared_ptr<SharedPages> pages = nullptr;
};

struct Memory {
  std::mutex mutex;
  std::map<std::uintptr_t, Piece> pieces;
  std::map<std::uintptr_t, std::size_t> freed;
};

Memory& memory() {
  static auto* const memory = new Memory;
  return *memory;
}

std::uintptr_t number(const void* at) { return reinterpret_cast<std::uintptr_t>(at); }

// The piece in `pieces` that holds an address.
template <class Pieces>
auto holding(Pieces& pieces, std::uintptr_t at) {
  auto found = pieces.upper_bound(at);
  if (found == pieces.begin()) return pieces.end();
  return --found;
}

void add(void* at, Piece piece) {
  const std::lock_guard lock(memory().mutex);
  std::erase_if(memory().freed, [&](const auto& old) {
    return old.first < number(at) + piece.bytes && number(at) < old.first + old.second;
  });
  memory().pieces.emplace(number(at), std::move(piece));
}

// The piece that begins there, if it is of this kind.
std::optional<Piece> piece_at(void* at, Kind kind) {
  const std::lock_guard lock(memory().mutex);
  const auto found = memory().pieces.find(number(at));
  if (found == memory().pieces.end() || found->second.kind != kind) return std::nullopt;
  return found->second;
}

Piece take(void* at) {
  const std::lock_guard lock(memory().mutex);
  const auto found = memory().pieces.find(number(at));
  Piece piece = std::move(found->second);
  if (piece.kind != Kind::registered) memory().freed[found->first] = piece.bytes;
  memory().pieces.erase(found);
  return piece;
}

// Where bytes lie; "pageable" is what CUDA knows nothing of.
enum class Where { device, pinned, pageable };

Where where(const void* at, std::size_t bytes) {
  const std::lock_guard lock(memory().mutex);
  if (const auto old = holding(memory().freed, number(at)); old != memory().freed.end())
    if (number(at) < old->first + old->second) misuse("memory that was freed");
  const auto found = holding(memory().pieces, number(at));
  if (found == memory().pieces.end() || number(at) >= found->first + found->second.bytes)
    return Where::pageable;
  if (number(at) + bytes > found->first + found->second.bytes) misuse("more than the memory that was made");
  const Kind kind = found->second.kind;
  return kind == Kind::device || kind == Kind::opened ? Where::device : Where::pinned;
}

}  // namespace

int fake_cuda::memory_left() {
  const std::lock_guard lock(memory().mutex);
  return static_cast<int>(memory().pieces.size());
}

int fake_cuda::left() { return memory_left() + events_left(); }

std::string fake_cuda::what_is_left() {
  std::string text = std::to_string(events_left()) + " events";
  const std::lock_guard lock(memory().mutex);
  for (const auto& [at, piece] : memory().pieces)
    text += ", " + std::to_string(piece.bytes) + " bytes of kind " + std::to_string(int(piece.kind));
  return text;
}

// ---- making and freeing ----

// What memory holds at first is no promise.
cudaError_t cudaMalloc(void** at, std::size_t bytes) {
  return call(__func__, [&] {
    if (capturing_forbids()) return cudaErrorStreamCaptureUnsupported;
    const auto pages = SharedPages::make(bytes);
    std::memset(pages->data(), 0xcb, bytes);
    *at = pages->data();
    add(*at, {Kind::device, bytes, current_device(), pages});
    return cudaSuccess;
  });
}

cudaError_t cudaFree(void* at) {
  return call(__func__, [&] {
    if (!at) return cudaSuccess;
    if (capturing_forbids()) return cudaErrorStreamCaptureUnsupported;
    const auto piece = piece_at(at, Kind::device);
    if (!piece) misuse("what is freed is no memory of a device");
    if (piece->pages->front().opened > 0) misuse("memory is freed that others have open");
    drain(piece->device);
    piece->pages->front().gone = true;
    take(at);
    return cudaSuccess;
  });
}

cudaError_t cudaHostAlloc(void** at, std::size_t bytes, unsigned) {
  return call(__func__, [&] {
    if (capturing_forbids()) return cudaErrorStreamCaptureUnsupported;
    const auto pages = SharedPages::make(bytes);
    std::memset(pages->data(), 0xcb, bytes);
    *at = pages->data();
    add(*at, {Kind::pinned, bytes, current_device(), pages});
    return cudaSuccess;
  });
}

cudaError_t cudaFreeHost(void* at) {
  return call(__func__, [&] {
    if (capturing_forbids()) return cudaErrorStreamCaptureUnsupported;
    if (!piece_at(at, Kind::pinned)) misuse("what is freed is no pinned memory");
    for (int device = 0; device < device_count(); ++device) drain(device);
    take(at);
    return cudaSuccess;
  });
}

cudaError_t cudaHostRegister(void* at, std::size_t bytes, unsigned) {
  return call(__func__, [&] {
    if (where(at, bytes) != Where::pageable) return cudaErrorHostMemoryAlreadyRegistered;
    add(at, {Kind::registered, bytes, current_device()});
    return cudaSuccess;
  });
}

cudaError_t cudaHostUnregister(void* at) {
  return call(__func__, [&] {
    if (!piece_at(at, Kind::registered)) return cudaErrorHostMemoryNotRegistered;
    for (int device = 0; device < device_count(); ++device) drain(device);
    take(at);
    return cudaSuccess;
  });
}

cudaError_t cudaHostGetDevicePointer(void** at, void* host, unsigned) {
  return call(__func__, [&] {
    if (where(host, 1) != Where::pinned) return cudaErrorInvalidValue;
    *at = host;
    return cudaSuccess;
  });
}

// ---- copying ----

// What lies in pageable memory is read before the call returns, and has been written when it does.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return call(__func__, [&] {
    if (bytes == 0) return cudaSuccess;
    const bool staged = where(from, bytes) == Where::pageable && !captures(stream);
    const bool waits = where(to, bytes) == Where::pageable && !captures(stream);
    std::vector<std::byte> stage;
    if (staged)
      stage.assign(static_cast<const std::byte*>(from), static_cast<const std::byte*>(from) + bytes);
    const cudaError_t error = queue(
        stream, [=, stage = std::move(stage)] { std::memcpy(to, staged ? stage.data() : from, bytes); });
    if (error == cudaSuccess && waits) stream_of(stream).wait_for(stream_of(stream).last());
    return error;
  });
}

// As CUDA's: done on return only where the host's memory takes part.
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return call(__func__, [&] {
    if (capturing_forbids()) return cudaErrorStreamCaptureUnsupported;
    const bool waits = where(to, bytes) != Where::device || where(from, bytes) != Where::device;
    const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
    if (error == cudaSuccess && waits) stream_of(nullptr).wait_for(stream_of(nullptr).last());
    return error;
  });
}

cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t stream) {
  return call(__func__, [&] {
    if (where(at, bytes) == Where::pageable) return cudaErrorInvalidValue;
    return queue(stream, [=] { std::memset(at, value, bytes); });
  });
}

// It returns before the memory is set.
cudaError_t cudaMemset(void* at, int value, std::size_t bytes) {
  return call(__func__, [&] {
    if (capturing_forbids()) return cudaErrorStreamCaptureUnsupported;
    return cudaMemsetAsync(at, value, bytes, nullptr);
  });
}

// ---- between processes ----

// Smaller pieces share a block with others, and it is the block that a handle means.
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* at) {
  return call(__func__, [&] {
    constexpr std::size_t kBlock = std::size_t{2} << 20;
    const auto piece = piece_at(at, Kind::device);
    if (!piece || piece->bytes % kBlock != 0) return cudaErrorInvalidValue;
    piece->pages->write_handle(handle->reserved);
    return cudaSuccess;
  });
}

cudaError_t cudaIpcOpenMemHandle(void** at, cudaIpcMemHandle_t handle, unsigned) {
  return call(__func__, [&] {
    const auto pages = SharedPages::open(handle.reserved);
    if (!pages) return cudaErrorInvalidResourceHandle;
    *at = pages->data();
    add(*at, {Kind::opened, pages->bytes(), current_device(), pages});
    return cudaSuccess;
  });
}

cudaError_t cudaIpcCloseMemHandle(void* at) {
  return call(__func__, [&] {
    const auto piece = piece_at(at, Kind::opened);
    if (!piece) misuse("what is closed was not opened");
    if (piece->device != current_device()) misuse("memory is closed on another device than it was opened on");
    drain(piece->device);
    --take(at).pages->front().opened;
    return cudaSuccess;
  });
}
