#include "nccl/communicator.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>

#include "core/error.hpp"

namespace xc {
namespace {

using std::chrono::milliseconds;

constexpr std::chrono::microseconds kNap{100};
constexpr milliseconds kFarewell{5'000};  // for what is under way when a communicator is destroyed
constexpr int kRoundsOfPatience = 10;

std::string seconds(milliseconds time) {
  std::string text = std::to_string(static_cast<double>(time.count()) / 1000);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text + " s";
}

std::string list_of(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

// Every rank's "version path".
void require_one_version(const std::vector<std::string>& libraries) {
  std::map<std::string, std::vector<int>> ranks;
  std::map<std::string, std::string> names;
  for (std::size_t rank = 0; rank < libraries.size(); ++rank) {
    const std::size_t space = libraries[rank].find(' ');
    const std::string version = nccl_version_text(std::atoi(libraries[rank].c_str()));
    ranks[version].push_back(static_cast<int>(rank));
    names.emplace(version, "NCCL " + version + " (" + libraries[rank].substr(space + 1) + ")");
  }
  if (ranks.size() == 1) return;
  std::string text;
  for (const auto& [version, who] : ranks)
    text += (text.empty() ? "" : ", ") + names[version] + " on " + list_of(who);
  throw MismatchError(text + ". All ranks need the same; XC_NCCL=/path/to/libnccl.so.2 names a library");
}

// A call that failed names its rank already.
std::string first_complaint_in(const std::vector<std::string>& texts) {
  for (std::size_t rank = 0; rank < texts.size(); ++rank) {
    if (texts[rank].front() != '-') continue;
    const std::string who = "rank " + std::to_string(rank) + ": ";
    const std::string text = texts[rank].substr(1);
    return text.starts_with(who) ? text : who + text;
  }
  return {};
}

NcclOptions with_members(NcclOptions options) {
  if (!options.members.empty()) return options;
  options.members.resize(static_cast<std::size_t>(options.size));
  std::iota(options.members.begin(), options.members.end(), 0);
  return options;
}

}  // namespace

NcclCommunicator::NcclCommunicator(NcclOptions options)
    : options_(with_members(std::move(options))), api_(load()) {
  connect(agree_on_id());
  watchdog_ = std::thread([this] { watch(); });
}

NcclCommunicator::~NcclCommunicator() {
  {
    const std::lock_guard lock(fate_);
    leaving_ = true;
    turned_.notify_all();
  }
  watchdog_.join();
  close();
}

// What every rank brings, a complaint or else a value; the first character tells which.
std::vector<std::string> NcclCommunicator::gather(const std::string& complaint,
                                                  const std::string& value) const {
  return options_.all_gather(complaint.empty() ? "+" + value : "-" + complaint);
}

// Every rank's value; if a rank has a complaint instead, all throw it.
std::vector<std::string> NcclCommunicator::values(const std::string& complaint,
                                                  const std::string& value) const {
  std::vector<std::string> texts = gather(complaint, value);
  if (const std::string text = first_complaint_in(texts); !text.empty()) throw CommError(text);
  for (std::string& text : texts) text.erase(0, 1);
  return texts;
}

std::string NcclCommunicator::first_complaint(const std::string& mine) const {
  return first_complaint_in(gather(mine, {}));
}

NcclApi NcclCommunicator::load() const {
  NcclApi api;
  const std::string complaint = complaint_of([&] { api = NcclApi::load(options_.library); });
  require_one_version(values(complaint, std::to_string(api.version) + " " + api.path));
  return api;
}

int NcclCommunicator::place_of(int rank) const {
  return static_cast<int>(std::find(members().begin(), members().end(), rank) - members().begin());
}

NcclUniqueId NcclCommunicator::agree_on_id() const {
  NcclUniqueId id{};
  std::string complaint;
  const int first = members().front();
  if (rank() == first)
    if (const NcclResult result = api_.get_unique_id(&id); result != NcclResult::success)
      complaint = api_.words(api_.get_unique_id.name, result);
  const std::string of_first =
      values(complaint, {id.bytes, sizeof id.bytes})[static_cast<std::size_t>(first)];
  std::memcpy(id.bytes, of_first.data(), sizeof id.bytes);
  return id;
}

void NcclCommunicator::connect(const NcclUniqueId& id) {
  NcclConfig config;
  NcclOutcome outcome{api_.comm_init.name, api_.comm_init(&made_, static_cast<int>(members().size()), id,
                                                          place_of(rank()), &config)};
  comm_ = made_;
  outcome.result = wait(outcome.result, Clock::now() + options_.patience);
  const std::string complaint = first_complaint(complaint_about(outcome));
  if (complaint.empty()) return;
  end();
  throw CommError(complaint);
}

// The handle; throws if there is none any more.
NcclHandle NcclCommunicator::sound() const {
  check();
  return comm_.load();
}

NcclResult NcclCommunicator::state(NcclHandle comm) const {
  NcclResult state = NcclResult::success;
  const NcclResult asked = api_.comm_state(comm, &state);
  return asked == NcclResult::success ? state : asked;
}

// What becomes of a call in progress; it still is if time runs out or this is ended.
NcclResult NcclCommunicator::wait(NcclResult result, Clock::time_point deadline) {
  while (result == NcclResult::in_progress && Clock::now() < deadline) {
    std::this_thread::sleep_for(kNap);
    const std::lock_guard turn(turn_);
    if (!reason().empty()) break;
    result = state(comm_);
  }
  return result;
}

void NcclCommunicator::settle(NcclOutcome outcome) {
  outcome.result = wait(outcome.result, Clock::now() + options_.patience);
  if (outcome.result == NcclResult::success) return;
  abort("rank " + std::to_string(rank()) + ": " + complaint_about(outcome));
  check();
}

std::string NcclCommunicator::complaint_about(NcclOutcome outcome) const {
  if (outcome.result == NcclResult::success) return {};
  if (outcome.result != NcclResult::in_progress) return api_.words(outcome.doing, outcome.result);
  return std::string(outcome.doing) + " did not end within " + seconds(options_.patience) +
         ": a rank does not come, or NCCL finds no way to it [" + api_.name() +
         "; NCCL_DEBUG=INFO makes it say more]";
}

void NcclCommunicator::close() {
  const NcclHandle comm = comm_.load();
  if (!comm) return;
  const NcclResult result =
      wait(api_.comm_finalize(comm), Clock::now() + std::min(options_.patience, kFarewell));
  if (result != NcclResult::success) return end();
  api_.comm_destroy(comm);
}

std::string NcclCommunicator::reason() const {
  const std::lock_guard lock(fate_);
  return reason_;
}

void NcclCommunicator::check() const {
  if (const std::string why = reason(); !why.empty()) throw CommError(why);
}

void NcclCommunicator::abort(const std::string& reason) {
  std::unique_lock lock(fate_);
  if (reason_.empty()) reason_ = reason.empty() ? "aborted without a reason" : reason;
  turned_.notify_all();
  turned_.wait(lock, [this] { return ended_; });
}

void NcclCommunicator::watch() {
  std::unique_lock lock(fate_);
  while (!turned_.wait_for(lock, options_.round, [this] { return leaving_ || !reason_.empty(); })) {
    lock.unlock();
    const std::string found = failure();
    lock.lock();
    if (reason_.empty()) reason_ = found;
  }
  if (reason_.empty()) return;
  lock.unlock();
  {
    const auto turn = turn_or_not();
    end();
  }
  lock.lock();
  ended_ = true;
  turned_.notify_all();
}

std::unique_lock<std::mutex> NcclCommunicator::turn_or_not() {
  std::unique_lock turn(turn_, std::defer_lock);
  const auto deadline = Clock::now() + kRoundsOfPatience * options_.round;
  while (!turn.try_lock() && Clock::now() < deadline) std::this_thread::sleep_for(kNap);
  return turn;
}

// What has failed meanwhile; nothing if nothing has.
std::string NcclCommunicator::failure() {
  const auto turn = turn_or_not();
  const NcclResult result = state(comm_);
  if (result == NcclResult::success || result == NcclResult::in_progress) return {};
  return "rank " + std::to_string(rank()) + ": " + complaint_about({"a transfer by NCCL", result});
}

void NcclCommunicator::end() {
  if (const NcclHandle comm = comm_.exchange(nullptr)) api_.comm_abort(comm);
}

}  // namespace xc
