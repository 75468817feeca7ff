#include "core/error.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace xc {

std::size_t whole_characters(const std::string& text, std::size_t room) {
  std::size_t size = std::min(text.size(), room);
  while (size < text.size() && size > 0 && (text[size] & 0xc0) == 0x80) --size;
  return size;
}

void throw_errno(const std::string& doing) {
  const int code = errno;
  throw CommError(doing + ": " + std::strerror(code));
}

}  // namespace xc
