#include "comm/herald.hpp"

#include <cstring>
#include <exception>

#include "core/error.hpp"

namespace xc {

std::int64_t Herald::open_channel() {
  open_.emplace_back();
  return channels() - 1;
}

// A wire that is broken, too, leaves the others to their deadlines.
void Herald::tell(std::int64_t channel, Failure why, int about, const std::string& reason) {
  if (!wire_ || at(channel).left) return;
  at(channel).left = about == topology_.rank();
  News news{channel, at(channel).call, about, why, {}};
  reason.copy(news.reason, whole_characters(reason, kReasonBytes - 1));
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
  for (std::int64_t channel = first_; channel < channels(); ++channel)
    tell(channel, Failure::departed, topology_.rank(), reason);
}

std::optional<Herald::News> Herald::heard(std::int64_t channel) {
  if (!wire_) return std::nullopt;
  std::byte bytes[Wire::kNoticeBytes];
  while (wire_->notice(bytes)) std::memcpy(&heard_.emplace_back(), bytes, sizeof(News));
  for (const News& news : heard_)
    if (news.channel == channel && news.call <= at(channel).call) return news;
  return std::nullopt;
}

}  // namespace xc
