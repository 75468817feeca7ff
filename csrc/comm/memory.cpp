#include "comm/memory.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "core/error.hpp"

namespace xc {
namespace {

constexpr std::size_t kUnknown = SIZE_MAX;

// /proc/meminfo's MemAvailable in bytes.
std::size_t available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  std::size_t kilobytes = 0;
  while (file >> key >> kilobytes) {
    if (key == "MemAvailable:") return kilobytes * 1024;
    std::getline(file, unit);
  }
  return kUnknown;
}

std::size_t number_in(const char* path) {
  std::ifstream file(path);
  std::size_t number = 0;
  return file >> number ? number : kUnknown;
}

// What the container may still take; its memory counts against the limit, shared or not.
std::size_t allowed_memory() {
  const std::size_t limit = number_in("/sys/fs/cgroup/memory.max");
  const std::size_t used = number_in("/sys/fs/cgroup/memory.current");
  return limit == kUnknown || used == kUnknown ? kUnknown : limit - std::min(limit, used);
}

std::string megabytes(std::size_t bytes) { return std::to_string((bytes + 999'999) / 1'000'000) + " MB"; }

std::string unique_name() {
  std::random_device random;
  return "/extrapcomm-" + std::to_string(getpid()) + "-" + std::to_string(random()) +
         std::to_string(random());
}

// The mappings of which forked children get copies. A child of a process with threads may do little before it
// begins another program: here it only maps anew.
class CopiedForChildren {
 public:
  struct Place {
    std::byte* at;
    std::size_t bytes;
    int fd;
  };

  static CopiedForChildren& all() {
    static auto* const kAll = new CopiedForChildren;  // handlers of fork may run as late as exit handlers
    return *kAll;
  }

  void add(const Place& place) {
    const std::lock_guard guard(lock_);
    places_.push_back(place);
  }

  void remove(const std::byte* at) {
    const std::lock_guard guard(lock_);
    std::erase_if(places_, [=](const Place& place) { return place.at == at; });
  }

 private:
  CopiedForChildren() {
    pthread_atfork([] { all().lock_.lock(); }, [] { all().lock_.unlock(); },
                   [] {
                     all().map_anew();
                     all().lock_.unlock();
                   });
  }

  // In the child. Its own children copy its private pages as any others, so this happens once.
  void map_anew() {
    for (const Place& place : places_)
      if (mmap(place.at, place.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
               place.fd, 0) == MAP_FAILED)
        mprotect(place.at, place.bytes,
                 PROT_READ);  // rather an end by a signal than writes into the parent's
    places_.clear();
  }

  std::mutex lock_;
  std::vector<Place> places_;
};

FileDescriptor create(Provider provider, const std::string& name) {
  if (provider == Provider::memfd) return FileDescriptor(memfd_create("extrapcomm", MFD_CLOEXEC));
  return FileDescriptor(shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600));
}

}  // namespace

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

int FileDescriptor::release() { return std::exchange(fd_, -1); }

Mapping::Mapping(const FileDescriptor& fd, std::size_t bytes) : bytes_(bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (at == MAP_FAILED) throw_errno("mapping " + megabytes(bytes) + " of shared memory");
  data_ = static_cast<std::byte*>(at);
}

Mapping::Mapping(std::size_t bytes) : bytes_(bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw_errno("allocating " + megabytes(bytes));
  data_ = static_cast<std::byte*>(at);
}

void Mapping::copy_for_children(FileDescriptor fd) {
  for_children_ = std::move(fd);
  CopiedForChildren::all().add({data_, bytes_, for_children_.get()});
}

Mapping::~Mapping() {
  if (for_children_.get() >= 0) CopiedForChildren::all().remove(data_);
  if (release_)
    release_();
  else
    munmap(data_, bytes_);
}

void require_obtainable(std::size_t bytes) {
  const std::size_t free = std::min(available_memory(), allowed_memory());
  if (bytes > free)
    throw CommError("the ranks together need " + megabytes(bytes) +
                    " of shared memory, but the machine has " + megabytes(free) +
                    " to give; use a smaller model, fewer workers or more nodes");
}

void allocate(const FileDescriptor& fd, std::size_t bytes) {
  int code;
  do code = posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes));
  while (code == EINTR);
  if (code == 0) return;
  errno = code;
  throw_errno("this rank needs " + megabytes(bytes) + " of shared memory, of " +
              megabytes(available_memory()) +
              " available (a container may allow less: see its memory limit and the size of /dev/shm)");
}

SharedFile::SharedFile(Provider provider, std::size_t bytes)
    : provider_(provider), name_(provider == Provider::posix ? unique_name() : "") {
  fd_ = create(provider, name_);
  if (fd_.get() < 0) throw_errno("creating shared memory");
  if (bytes > 0) allocate(fd_, bytes);
}

SharedFile::~SharedFile() { forget_name(); }

void SharedFile::forget_name() {
  if (!name_.empty()) shm_unlink(name_.c_str());
  name_.clear();
}

// The path under which a peer opens the file; a leading ':' marks a POSIX name.
std::string SharedFile::ticket() const {
  if (provider_ == Provider::posix) return ":" + name_;
  return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(fd_.get());
}

FileDescriptor SharedFile::open(const std::string& ticket) {
  const bool posix = ticket.front() == ':';
  FileDescriptor fd(posix ? shm_open(ticket.c_str() + 1, O_RDWR | O_CLOEXEC, 0600)
                          : ::open(ticket.c_str(), O_RDWR | O_CLOEXEC));
  if (fd.get() < 0) throw_errno("opening a peer's shared memory " + ticket);
  return fd;
}

}  // namespace xc
