#pragma once

#include <dlfcn.h>

#include <barrier>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "fake_nccl.hpp"
#include "nccl/communicator.hpp"

// What the stand-in for NCCL is told to do. Its path comes from CMake.
inline const FakeNccl& fake() {
  static const FakeNccl* controls = [] {
    void* library = dlopen(FAKE_NCCL, RTLD_NOW);
    CHECK(library);
    return reinterpret_cast<const FakeNccl* (*)()>(dlsym(library, "fake_nccl"))();
  }();
  return *controls;
}

// Ranks as threads that NCCL, the stand-in, connects.
class Party {
 public:
  explicit Party(int size) : size_(size), barrier_(size), texts_(static_cast<std::size_t>(size)) {}

  xc::NcclOptions options(int rank) {
    using namespace std::chrono_literals;
    return {.library = FAKE_NCCL,
            .rank = rank,
            .size = size_,
            .all_gather = [this, rank](const std::string& mine) { return all_gather(rank, mine); },
            .patience = 20s,
            .round = 5ms};
  }

  std::shared_ptr<xc::NcclCommunicator> communicator(int rank, std::vector<int> members = {}) {
    xc::NcclOptions options = this->options(rank);
    options.members = std::move(members);
    return std::make_shared<xc::NcclCommunicator>(options);
  }

  void meet() { barrier_.arrive_and_wait(); }

  std::vector<std::string> all_gather(int rank, const std::string& mine) {
    texts_[static_cast<std::size_t>(rank)] = mine;
    meet();
    std::vector<std::string> all = texts_;
    meet();
    return all;
  }

  template <class Body>
  void run(Body body) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size_; ++rank) threads.emplace_back([&body, rank] { body(rank); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  int size_;
  std::barrier<> barrier_;
  std::vector<std::string> texts_;
};
