#include "core/environment.hpp"

#include <charconv>
#include <cstdlib>
#include <string>

#include "core/error.hpp"

namespace xc {

std::optional<std::int64_t> number_in_environment(const char* variable) {
  const char* const set = std::getenv(variable);
  const std::string text = set ? set : "";
  if (text.empty()) return std::nullopt;
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 1)
    throw UsageError(std::string(variable) + " is '" + text + "'; it takes a whole number of at least 1");
  return number;
}

}  // namespace xc
