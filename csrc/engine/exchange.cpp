#include "engine/exchange.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "core/float_environment.hpp"

namespace xc {
namespace {

// Control memory of a rank: the outcome word (rank 0's is the one in use), its arrival word, its two posts.
constexpr std::size_t kArrivalOffset = sizeof(OutcomeWord);
constexpr std::size_t kPostsOffset = kArrivalOffset + sizeof(ArrivalWord);

OutcomeWord& outcome(const Shared& control) {
  return *reinterpret_cast<OutcomeWord*>(control.front()->data());
}

std::vector<ArrivalWord*> arrivals(const Shared& control) {
  std::vector<ArrivalWord*> words;
  for (const auto& memory : control)
    words.push_back(reinterpret_cast<ArrivalWord*>(memory->data() + kArrivalOffset));
  return words;
}

}  // namespace

std::size_t Exchange::control_bytes(std::size_t doubles, std::size_t layers) {
  return kPostsOffset + 2 * Post::size(doubles, layers);
}

Exchange::Exchange(std::shared_ptr<Team> team, const Shared& control, std::vector<std::string> double_names,
                   std::size_t layers)
    : team_(std::move(team)),
      double_names_(std::move(double_names)),
      layers_(layers),
      meeting_(team_->meeting(outcome(control), arrivals(control))) {
  for (const auto& memory : control) posts_.push_back(memory->data() + kPostsOffset);
}

Post Exchange::post(int rank) const {
  const std::size_t size = Post::size(double_names_.size(), layers_);
  return {posts_[static_cast<std::size_t>(rank)] + (sequence_ & 1) * size, double_names_.size(), layers_};
}

void Exchange::require_open() const {
  team_->require_member();
  if (closed_) throw UsageError("this engine or array is closed");
}

void Exchange::meet_at_a(const Call& call) {
  PostHeader& header = post(team_->rank()).header();
  header.operation = static_cast<std::uint32_t>(call.operation);
  header.sequence = sequence_;
  header.hash = call.hash;
  meet("meeting A", call.step, meeting_.limits().between_steps, unsettled_);
}

// After a failure inside a step `touched` is true for ever: no later call settles what it left. A rank that
// is interrupted while it waits may find that the others have met and gone on to write.
void Exchange::meet(const char* where, std::int64_t step, Seconds deadline, bool touched) {
  unsettled_ = touched;
  try {
    meeting_.meet(where, step, deadline);
  } catch (...) {
    unsettled_ = touched || !meeting_.failed_here();
    throw;
  }
}

void Exchange::collective(const Call& call, const std::function<void(std::span<const Post>)>& work) {
  require_open();
  const Post mine = post(team_->rank());
  mine.complain("");
  std::copy(call.doubles.begin(), call.doubles.end(), mine.doubles().begin());
  std::copy(call.present.begin(), call.present.end(), mine.present().begin());
  meet_at_a(call);

  std::vector<Post> posts;
  for (int r = 0; r < team_->size(); ++r) posts.push_back(post(r));
  ++sequence_;
  require_agreement(posts, call.doubles.empty() ? std::span<const std::string>() : double_names_);
  unsettled_ = true;
  try {
    const FloatEnvironment environment;
    work(posts);
  } catch (...) {
    meeting_.abandon(Failure::abandoned);
    throw;
  }
  meet("meeting B", call.step, meeting_.limits().inside_pass, true);
  unsettled_ = false;
}

void Exchange::meet_between_passes(std::int64_t step, bool touched) {
  meet("the meeting between passes", step, meeting_.limits().inside_pass, touched);
  unsettled_ = true;
}

void Exchange::complain(const Call& call, const std::string& text) {
  require_open();
  post(team_->rank()).complain(text);
  meet_at_a(call);
  std::vector<Post> posts;
  for (int r = 0; r < team_->size(); ++r) posts.push_back(post(r));
  ++sequence_;
  require_agreement(posts, {});
}

// A forked child has a copy of this object, but not the right to speak for its parent.
void Exchange::close() {
  if (team_->own_process()) meeting_.close();
  closed_ = true;
}

}  // namespace xc
