#include "core/error.hpp"

#include <cerrno>
#include <cstring>

namespace xc {

void throw_errno(const std::string& doing) {
  const int code = errno;
  throw CommError(doing + ": " + std::strerror(code));
}

}  // namespace xc
