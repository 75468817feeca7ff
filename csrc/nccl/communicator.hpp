#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "nccl/api.hpp"

namespace xc {

// Ranks that NCCL has connected. No call waits inside NCCL: a call that is still in progress is asked for
// again until it has ended, for `patience` at most, so that a rank that never comes is an error and not a
// hang.
//
// Whatever fails, on any side, ends the communicator: NCCL has no way back from half a group. The first
// reason is kept, and everything later throws it. A watchdog asks NCCL every now and then whether a transfer
// has failed, and it alone aborts, whoever wants it: nobody else may touch what it frees. It calls NCCL and
// nothing but NCCL.
//
// One thread at a time calls NCCL. Only the watchdog gives up waiting for its turn, after ten rounds: a
// thread that has not come back by then is itself held up by what must be ended.
//
// What hangs on the device is not noticed here. Who waits for a stream has a deadline and aborts.
struct NcclOptions {
  std::string library;  // path; empty: the one of this process, or what the loader finds
  int rank = 0;
  int size = 1;  // of all that agree, whatever fails on one of them
  // Those that are connected with this one, itself among them: a part of all ranks, every one of which is in
  // one such part. None: all are one.
  std::vector<int> members = {};
  // Gives every rank's bytes to every rank, in the order of ranks.
  std::function<std::vector<std::string>(const std::string&)> all_gather;
  std::chrono::milliseconds patience{60'000};
  std::chrono::milliseconds round{100};  // of the watchdog
};

// What was called, and what came of it.
struct NcclOutcome {
  const char* doing;
  NcclResult result;
};

class NcclCommunicator {
 public:
  // Collective, on the device that is current. Fails on all ranks alike: CommError if one of them has no
  // library or cannot be connected, MismatchError if their versions differ.
  explicit NcclCommunicator(NcclOptions options);
  // Lets NCCL bring to an end what it has begun, but not for long.
  ~NcclCommunicator();
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  const NcclApi& api() const { return api_; }
  int rank() const { return options_.rank; }
  // The ranks that are connected, in the order in which NCCL counts them, and the place of one among them.
  const std::vector<int>& members() const { return options_.members; }
  int place_of(int rank) const;

  // NcclOutcome work(NcclHandle): calls of NCCL by this thread alone.
  template <class Work>
  NcclOutcome begin(Work work) {
    const std::lock_guard turn(turn_);
    return work(sound());
  }
  // The same, and waits until NCCL is ready for the next call. CommError if that fails, or takes too long.
  template <class Work>
  void call(Work work) {
    settle(begin(work));
  }

  // Throws CommError with the reason if this has been ended.
  void check() const;
  // Returns when NCCL has ended. Idempotent, from any thread.
  void abort(const std::string& reason);

  // Collective. The first text that a rank brings, with its rank; the same on every rank.
  std::string first_complaint(const std::string& mine) const;

 private:
  using Clock = std::chrono::steady_clock;

  std::vector<std::string> gather(const std::string& complaint, const std::string& value) const;
  std::vector<std::string> values(const std::string& complaint, const std::string& value) const;
  NcclApi load() const;
  NcclUniqueId agree_on_id() const;
  void connect(const NcclUniqueId& id);
  NcclHandle sound() const;
  NcclResult state(NcclHandle comm) const;
  NcclResult wait(NcclResult result, Clock::time_point deadline);
  void settle(NcclOutcome outcome);
  std::string complaint_about(NcclOutcome outcome) const;
  void close();

  std::string reason() const;
  void watch();
  std::unique_lock<std::mutex> turn_or_not();
  std::string failure();
  void end();

  NcclOptions options_;
  NcclApi api_;
  NcclHandle made_ = nullptr;  // NCCL writes here until it is connected
  std::atomic<NcclHandle> comm_ = nullptr;
  std::mutex turn_;  // to call NCCL

  mutable std::mutex fate_;  // guards what follows
  std::condition_variable turned_;
  std::string reason_;  // why this was ended
  bool ended_ = false;
  bool leaving_ = false;
  std::thread watchdog_;
};

}  // namespace xc
