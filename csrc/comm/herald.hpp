#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/control.hpp"
#include "comm/topology.hpp"
#include "comm/wire.hpp"

namespace xc {

// Bad news between teams. Inside a team everybody sees who is dead or gone; other teams would only see that
// nothing comes over the wire any more. So whoever finds a failure tells one rank of every other team, which
// makes its own team fail. News concern one CHANNEL (an engine or array, numbered in the order in which all
// ranks construct them) from a CALL on: calls before it were completed, and a rank that is still busy with one
// pays no heed.
class Herald {
 public:
  struct News {
    std::int64_t channel;
    std::uint64_t call;
    int about;  // a rank
    Failure why;
    char reason[kReasonBytes];  // ends with a zero
  };
  static_assert(sizeof(News) <= Wire::kNoticeBytes);

  Herald(const Topology& topology, std::shared_ptr<Wire> wire)
      : topology_(topology), wire_(std::move(wire)) {}

  std::int64_t open_channel();
  // This rank is in that call of a channel, or comes to it next.
  void set_call(std::int64_t channel, std::uint64_t call) { calls_[static_cast<std::size_t>(channel)] = call; }
  // Says that `about` takes no part in the present call of the channel, nor in any later one; of this rank
  // itself once.
  void tell(std::int64_t channel, Failure why, int about, const std::string& reason = {});
  // Says so of this rank and of all channels.
  void leave(const std::string& reason);
  // What concerns the present call of a channel.
  std::optional<News> heard(std::int64_t channel);

 private:
  const Topology& topology_;
  std::shared_ptr<Wire> wire_;
  std::vector<std::uint64_t> calls_;  // of each channel
  std::vector<bool> left_;            // whether this rank has said that it left it
  std::vector<News> heard_;
};

}  // namespace xc
