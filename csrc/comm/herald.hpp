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
// ranks construct them) from a CALL on: calls before it were completed, and a rank that is still busy with
// one pays no heed.
class Herald {
 public:
  struct News {
    std::int64_t world;
    std::int64_t channel;  // or -1: all that are opened from number `call` on
    std::uint64_t call;
    int about;  // a rank
    Failure why;
    char reason[kReasonBytes];  // ends with a zero
  };
  static_assert(sizeof(News) <= Wire::kNoticeBytes);

  Herald(const Topology& topology, std::shared_ptr<Wire> wire, std::int64_t world, std::int64_t first_channel)
      : topology_(topology), wire_(std::move(wire)), world_(world), first_(first_channel) {}

  std::int64_t open_channel();
  std::int64_t channels() const { return first_ + static_cast<std::int64_t>(open_.size()); }
  // This rank is in that call of a channel, or comes to it next.
  void set_call(std::int64_t channel, std::uint64_t call) { at(channel).call = call; }
  // Says that `about` takes no part in the present call of the channel, nor in any later one; of this rank
  // itself once.
  void tell(std::int64_t channel, Failure why, int about, const std::string& reason = {});
  // Says nothing more of a channel: it has failed for all, and all are told why.
  void hush(std::int64_t channel) { at(channel).left = true; }
  // Says so of this rank and of all channels, also those that others may open.
  void leave(const std::string& reason);
  // What concerns the present call of a channel.
  std::optional<News> heard(std::int64_t channel);
  // Which rank of another team has left the world altogether.
  std::optional<News> departure();

 private:
  struct Channel {
    std::uint64_t call = 0;
    bool left = false;  // this rank has said so
  };
  void send(const News& news);
  void listen();
  Channel& at(std::int64_t channel) { return open_[static_cast<std::size_t>(channel - first_)]; }

  const Topology& topology_;
  std::shared_ptr<Wire> wire_;
  std::int64_t world_;  // its number among those that have used this wire
  std::int64_t first_;
  std::vector<Channel> open_;
  std::vector<News> heard_;
};

}  // namespace xc
