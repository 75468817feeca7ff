#pragma once

#include <cstdint>
#include <optional>

namespace xc {

// Returns what a variable of the environment is set to, nothing if it is unset or empty. Throws UsageError if
// it is not a whole number of at least 1.
std::optional<std::int64_t> number_in_environment(const char* variable);

}  // namespace xc
