#include "comm/team.hpp"

#include <sched.h>
#include <unistd.h>

#include <optional>
#include <random>
#include <utility>

#include "core/error.hpp"

namespace xc {
namespace {

std::uint64_t random_nonce() {
  std::random_device random;
  return (std::uint64_t{random()} << 32) | random() | 1u;
}

std::string own_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  return {reinterpret_cast<const char*>(&set), sizeof set};
}

int count_processors(const std::vector<std::string>& sets) {
  cpu_set_t all;
  CPU_ZERO(&all);
  for (const std::string& text : sets) CPU_OR(&all, &all, reinterpret_cast<const cpu_set_t*>(text.data()));
  return CPU_COUNT(&all);
}

}  // namespace

Team::Team(TeamOptions options)
    : options_(std::move(options)),
      members_(topology().members()),
      place_(topology().place()),
      herald_(options_.topology, options_.wire, options_.world, options_.first_channel),
      beacon_(is_local() ? Provider::memfd : options_.provider) {
  greet();
  processors_ = count_processors(team_gather(own_processors()));
  departures_ = share(sizeof(DepartureWord));
  const std::uint64_t nonce = random_nonce();
  departure(place_).nonce.store(nonce);
  const auto nonces = team_gather(std::to_string(nonce));
  agree(complaint_of([&] {
    for (int p = 0; p < size(); ++p)
      if (std::to_string(departure(p).nonce.load()) != nonces[static_cast<std::size_t>(p)])
        throw CommError("the memory of rank " + std::to_string(member(p)) + " that rank " +
                        std::to_string(rank()) + " opened is another's; the two are not on one machine");
  }));
}

Team::~Team() { leave(); }

// Every member's text. All ranks of all teams must call it, too.
std::vector<std::string> Team::team_gather(const std::string& mine) const {
  const auto all = all_gather(mine);
  std::vector<std::string> ours;
  for (const int r : members_) ours.push_back(all[static_cast<std::size_t>(r)]);
  return ours;
}

// Exchanges liveness files.
void Team::greet() {
  const auto tickets = team_gather(beacon_.ticket());
  agree(complaint_of([&] {
    for (int p = 0; p < size(); ++p)
      watches_.push_back(p == place_ || is_local() ? Watch() : Watch(tickets[static_cast<std::size_t>(p)]));
  }));
  beacon_.forget_name();
}

// Two exchanges: where the memory is, and whether everybody could allocate and open it. Names and descriptors
// can go after the second; the mappings stay.
void Team::require_memory(std::size_t bytes) const {
  std::size_t total = 0;
  for (const std::string& text : team_gather(std::to_string(bytes))) total += std::stoull(text);
  agree(complaint_of([&] { require_obtainable(total); }));
}

Shared Team::share_files(std::size_t bytes, Forked children) {
  require_memory(bytes);
  std::optional<SharedFile> mine;
  std::string complaint = complaint_of([&] { mine.emplace(options_.provider, bytes); });
  const auto tickets = team_gather(mine ? std::to_string(bytes) + " " + mine->ticket() : "");
  Shared all;
  if (complaint.empty())
    complaint = complaint_of([&] {
      for (const std::string& ticket : tickets) {
        if (ticket.empty()) return;  // its owner complains
        const std::size_t space = ticket.find(' ');
        FileDescriptor fd = SharedFile::open(ticket.substr(space + 1));
        all.push_back(std::make_shared<Mapping>(fd, std::stoull(ticket.substr(0, space))));
        if (children == Forked::copy && all.size() == static_cast<std::size_t>(place_) + 1)
          all.back()->copy_for_children(std::move(fd));
      }
    });
  agree(complaint);
  return all;
}

// Threads of one process tell each other where the owner of their mapping stands, and copy it before it goes.
Shared Team::share_locally(std::size_t bytes) {
  const auto mine = std::make_shared<Mapping>(bytes);
  const auto addresses = team_gather(std::to_string(reinterpret_cast<std::uintptr_t>(&mine)));
  Shared all;
  for (const std::string& address : addresses)
    all.push_back(*reinterpret_cast<const std::shared_ptr<Mapping>*>(std::stoull(address)));
  agree({});
  return all;
}

std::string Team::first_complaint(const std::string& mine) const {
  const auto complaints = all_gather(mine);
  for (std::size_t r = 0; r < complaints.size(); ++r)
    if (!complaints[r].empty())
      return (complaints.size() > 1 ? topology().name_of(static_cast<int>(r)) + ": " : "") + complaints[r];
  return {};
}

DepartureWord& Team::departure(int place) const {
  return *reinterpret_cast<DepartureWord*>(departures_[static_cast<std::size_t>(place)]->data());
}

// Waiting burns a processor only while every rank can have one of its own.
Meeting Team::meeting(OutcomeWord& outcome, std::vector<ArrivalWord*> arrivals) {
  Company company;
  company.alive = [this](int place) { return alive(place); };
  company.departed = [this](int place) { return departed(place); };
  company.farewell = [this](int place) { return farewell(place); };
  company.topology = &topology();
  company.herald = &herald_;
  company.interrupted = options_.interrupted;
  company.warn = options_.warn;
  company.limits = options_.limits;
  company.spin = size() <= processors_ ? Seconds(50e-6) : Seconds(0);
  return Meeting(outcome, std::move(arrivals), std::move(company));
}

bool Team::alive(int place) const { return watches_[static_cast<std::size_t>(place)].alive(); }

bool Team::departed(int place) const { return departure(place).left.load() != 0; }

void Team::leave(const std::string& reason) {
  if (departures_.empty() || !own_process() || departed(place_)) return;
  DepartureWord& mine = departure(place_);
  reason.copy(mine.reason, whole_characters(reason, kReasonBytes - 1));
  mine.left.store(1);
  herald_.leave(reason);
}

std::string Team::farewell(int place) const { return departed(place) ? departure(place).reason : ""; }

std::optional<std::pair<int, std::string>> Team::departure_elsewhere() {
  const auto news = herald_.departure();
  if (!news) return std::nullopt;
  return std::pair(news->about, std::string(news->reason));
}

bool Team::own_process() const { return getpid() == beacon_.pid(); }

void Team::require_member() const {
  require_own_process();
  if (departed(place_)) throw UsageError("this world is closed");
}

void Team::require_own_process() const {
  if (!own_process())
    throw UsageError("this process was forked from rank " + std::to_string(rank()) +
                     " and cannot take part in its collectives; use the engine in the parent only");
}

}  // namespace xc
