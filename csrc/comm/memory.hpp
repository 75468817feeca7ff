#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace xc {

// How peers reach each other's memory. A memfd is opened through /proc/<pid>/fd: it is never visible in a
// file system and not limited by the size of /dev/shm. Where that is refused (another PID namespace, a
// hardened kernel) POSIX shared memory stands in; its name is removed as soon as every peer has mapped it.
// Ranks that are threads of one process (`local`) share the mapping itself.
enum class Provider : std::uint8_t { memfd, posix, local };

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();
  int get() const { return fd_; }
  int release();

 private:
  int fd_ = -1;
};

// A mapped run of shared bytes; unmapped when the last owner lets go.
class Mapping {
 public:
  Mapping(const FileDescriptor& fd, std::size_t bytes);
  explicit Mapping(std::size_t bytes);  // of this process alone
  // Memory of another kind, and how to let go of it.
  Mapping(std::byte* at, std::size_t bytes, std::function<void()> release)
      : data_(at), bytes_(bytes), release_(std::move(release)) {}
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  // Gives children that this process forks from now on a copy of their own, made page by page when they
  // write. `fd` is the file that is mapped.
  void copy_for_children(FileDescriptor fd);
  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::function<void()> release_;
  FileDescriptor for_children_;
};

// A file that peers can open while it lives: what its ticket says. Memory and liveness locks both use it.
class SharedFile {
 public:
  SharedFile(Provider provider, std::size_t bytes);
  ~SharedFile();
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;
  const FileDescriptor& fd() const { return fd_; }
  void forget_name();  // peers have opened it
  std::string ticket() const;
  static FileDescriptor open(const std::string& ticket);

 private:
  Provider provider_;
  FileDescriptor fd_;
  std::string name_;
};

// CommError, with both sizes, if the machine or the container cannot give so many bytes.
void require_obtainable(std::size_t bytes);

// Gives `fd` its pages now, so that a shortage is an error here and never a SIGBUS later.
void allocate(const FileDescriptor& fd, std::size_t bytes);

}  // namespace xc
