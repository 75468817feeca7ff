#include "comm/liveness.hpp"

#include <fcntl.h>
#include <unistd.h>

#include "core/error.hpp"

namespace xc {
namespace {

struct flock whole_file() {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  return lock;
}

}  // namespace

Beacon::Beacon(Provider provider) : file_(provider, 0), pid_(getpid()) {
  struct flock lock = whole_file();
  if (fcntl(file_.fd().get(), F_SETLK, &lock) != 0) throw_errno("locking this rank's liveness file");
}

bool Watch::alive() const {
  if (fd_.get() < 0) return true;
  struct flock lock = whole_file();
  return fcntl(fd_.get(), F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

}  // namespace xc
