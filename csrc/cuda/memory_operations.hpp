#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/stream.hpp"

namespace xc {

// What streams do with words in memory by themselves. These are functions of CUDA's driver, which is asked
// for them when they are first wanted, so that nothing is linked.
class MemoryOperations {
 public:
  MemoryOperations();  // DeviceError where there are none

  // Stores a number, after all that was queued before.
  void write(Stream stream, std::uint32_t* word, std::uint32_t value) const;
  // What is queued from then on waits until the word is not behind the number; counters wrap around.
  void await(Stream stream, std::uint32_t* word, std::uint32_t value) const;

 private:
  decltype(&cuStreamWriteValue32) write_;
  decltype(&cuStreamWaitValue32) wait_;
  unsigned flags_;
};

}  // namespace xc
