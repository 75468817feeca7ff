#include "comm/herald.hpp"

#include <cstring>
#include <exception>

#include "core/error.hpp"

namespace xc {

std::int64_t Herald::open_channel() {
  open_.emplace_back();
  return channels() - 1;
}

void Herald::tell(std::int64_t channel, Failure why, int about, const std::string& reason) {
  if (!wire_ || at(channel).left) return;
  at(channel).left = about == topology_.rank();
  News news{world_, channel, at(channel).call, about, why, {}};
  reason.copy(news.reason, whole_characters(reason, kReasonBytes - 1));
  send(news);
}

// A wire that is broken, too, leaves the others to their deadlines.
void Herald::send(const News& news) {
  std::byte bytes[Wire::kNoticeBytes] = {};
  std::memcpy(bytes, &news, sizeof news);
  const int own_worker = topology_.rank() * topology_.workers();
  for (int team = 0; team < topology_.team_count(); ++team) {
    if (team == topology_.team()) continue;
    try {
      wire_->notify(topology_.carrier(own_worker, team), bytes);
    } catch (const std::exception&) {
    }
  }
}

void Herald::leave(const std::string& reason) {
  if (!wire_) return;
  for (std::int64_t channel = first_; channel < channels(); ++channel)
    tell(channel, Failure::departed, topology_.rank(), reason);
  News news{world_, -1, static_cast<std::uint64_t>(channels()), topology_.rank(), Failure::departed, {}};
  reason.copy(news.reason, whole_characters(reason, kReasonBytes - 1));
  send(news);
}

void Herald::listen() {
  std::byte bytes[Wire::kNoticeBytes];
  News news;
  while (wire_ && wire_->notice(bytes)) {
    std::memcpy(&news, bytes, sizeof news);
    if (news.world == world_) heard_.push_back(news);
  }
}

std::optional<Herald::News> Herald::heard(std::int64_t channel) {
  listen();
  for (const News& news : heard_) {
    if (news.channel == channel && news.call <= at(channel).call) return news;
    if (news.channel == -1 && static_cast<std::int64_t>(news.call) <= channel) return news;
  }
  return std::nullopt;
}

std::optional<Herald::News> Herald::departure() {
  listen();
  for (const News& news : heard_)
    if (news.channel == -1) return news;
  return std::nullopt;
}

}  // namespace xc
