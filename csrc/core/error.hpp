#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace xc {

// Every failure that reaches a user is one of these. A text says what was being done, which rank, and what to
// do.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller asked for something that cannot be; found before any communication, or agreed on by all ranks.
struct UsageError : Error {
  using Error::Error;
};

// The ranks did not ask for the same thing; raised alike on every rank before a weight is touched.
struct MismatchError : Error {
  using Error::Error;
};

// A rank died, left, or did not come in time.
struct PeerError : Error {
  PeerError(const std::string& text, int rank, std::int64_t step, std::string kind, std::string reason)
      : Error(text), rank(rank), step(step), kind(std::move(kind)), reason(std::move(reason)) {}
  int rank;
  std::int64_t step;
  std::string kind;    // of failure, in a word
  std::string reason;  // that the rank gave, if it did
};

// The operating system or a transport refused.
struct CommError : Error {
  using Error::Error;
};

// A device, or what drives it, refused or is not there.
struct DeviceError : Error {
  using Error::Error;
};

// How many bytes of a UTF-8 text fit into `room` without cutting a character.
std::size_t whole_characters(const std::string& text, std::size_t room);

// What `work` complains about, or nothing.
template <class F>
std::string complaint_of(F work) {
  try {
    work();
    return {};
  } catch (const std::exception& error) {
    return error.what();
  }
}

// CommError with the words of errno behind the text.
[[noreturn]] void throw_errno(const std::string& doing);

}  // namespace xc
