#pragma once

#include <string>

#include "comm/memory.hpp"

namespace xc {

// A rank is alive while it holds a POSIX record lock on its own liveness file. The kernel drops the lock when
// the process ends, however it ends, and only after its threads have left user mode, so no store of a dead
// rank can follow. Forked children do not inherit the lock. Closing ANY descriptor of the file in its owner
// would drop it: the owner keeps the one it made and never opens another.

class Beacon {
 public:
  explicit Beacon(Provider provider);
  std::string ticket() const { return file_.ticket(); }
  void forget_name() { file_.forget_name(); }
  int pid() const { return pid_; }

 private:
  SharedFile file_;
  int pid_;
};

// A peer's view of a beacon.
class Watch {
 public:
  Watch() = default;  // watches nobody: always alive, as one's own process is to itself
  explicit Watch(const std::string& ticket) : fd_(SharedFile::open(ticket)) {}
  bool alive() const;

 private:
  FileDescriptor fd_;
};

}  // namespace xc
