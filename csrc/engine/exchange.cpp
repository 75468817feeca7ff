#include "engine/exchange.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "comm/largest.hpp"
#include "core/error.hpp"
#include "core/float_environment.hpp"
#include "core/hash.hpp"

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

// The bits of numbers: where they differ between ranks, the hashes do.
std::uint64_t hash_of_bytes(const void* at, std::size_t bytes) {
  return hash_of({static_cast<const char*>(at), bytes});
}

constexpr std::size_t kRangeSize = 4;

// Adds a number so that its largest and its smallest value over all ranks can be told: in halves, as doubles.
void add_range(std::vector<double>& numbers, std::uint64_t value) {
  for (const std::uint64_t half : {value & 0xffffffffu, value >> 32}) {
    numbers.push_back(static_cast<double>(half));
    numbers.push_back(-static_cast<double>(half));
  }
}

// A range that every value fits.
void add_open_range(std::vector<double>& numbers) {
  numbers.insert(numbers.end(), kRangeSize, -std::numeric_limits<double>::infinity());
}

// Both halves' largest values are their smallest, or there is no value at all.
bool is_one_value(std::span<const double> range) {
  if (range[0] == -std::numeric_limits<double>::infinity()) return true;
  return range[0] == -range[1] && range[2] == -range[3];
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

Post Exchange::post(int place) const {
  const std::size_t size = Post::size(double_names_.size(), layers_);
  return {posts_[static_cast<std::size_t>(place)] + (sequence_ & 1) * size, double_names_.size(), layers_};
}

std::vector<Post> Exchange::posts() const {
  std::vector<Post> posts;
  for (int p = 0; p < team_->size(); ++p) posts.push_back(post(p));
  return posts;
}

void Exchange::require_open() const {
  team_->require_member();
  if (closed_) throw UsageError("this engine or array is closed");
  if (const Wire* const wire = team_->wire(); wire && wire->ended())
    throw UsageError(
        "MPI was finalized, and steps between teams need it: call MPI.Finalize() after the last step");
}

void Exchange::meet_at_a(const Call& call) {
  PostHeader& header = post(team_->place()).header();
  header.operation = static_cast<std::uint32_t>(call.operation);
  header.sequence = sequence_;
  header.hash = call.hash;
  header.declared = call.declared;
  step_ = call.step;
  meeting_.set_call(sequence_);
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

void Exchange::collective(const Call& call, const std::function<void(const Agreed&)>& work) {
  require_open();
  const Post mine = post(team_->place());
  mine.complain("");
  std::copy(call.doubles.begin(), call.doubles.end(), mine.doubles().begin());
  std::copy(call.present.begin(), call.present.end(), mine.present().begin());
  meet_at_a(call);
  const Agreed agreed = agree(call, false);
  unsettled_ = true;
  try {
    const FloatEnvironment environment;
    work(agreed);
  } catch (const WireError& refused) {
    meeting_.lose(refused, "the wire", call.step);
  } catch (...) {
    meeting_.abandon(Failure::abandoned);
    throw;
  }
  meet("meeting B", call.step, meeting_.limits().inside_pass, true);
  meeting_.set_call(sequence_);
  unsettled_ = false;
}

void Exchange::meet_between_passes(std::int64_t step, bool touched) {
  meet("the meeting between passes", step, meeting_.limits().inside_pass, touched);
  unsettled_ = true;
}

void Exchange::wait_for_wire(const std::function<bool()>& done,
                             const std::function<std::vector<int>()>& awaited) {
  meeting_.wait_until(done, awaited, "the wire", step_, meeting_.limits().inside_pass);
}

void Exchange::complain(const Call& call, const std::string& text) {
  require_open();
  post(team_->place()).complain(text);
  meet_at_a(call);
  agree(call, true);
}

// A forked child has a copy of this object, but not the right to speak for its parent.
void Exchange::close() {
  if (team_->own_process()) meeting_.close();
  closed_ = true;
}

// ---- agreement ----

// Whatever comes of it, this call's posts are behind.
Exchange::Agreed Exchange::agree(const Call& call, bool complains) {
  const auto all = posts();
  const Post mine = post(team_->place());
  ++sequence_;
  return team_->wire() ? agree_over_wire(call, mine, complains) : agree_in_team(call, all);
}

Exchange::Agreed Exchange::agree_in_team(const Call& call, std::span<const Post> posts) const {
  require_agreement(posts, call.doubles.empty() ? std::span<const std::string>() : double_names_,
                    team_->topology());
  const auto doubles = posts[0].doubles().first(call.doubles.size());
  Agreed agreed{{doubles.begin(), doubles.end()}, std::vector<std::uint8_t>(call.present.size(), 0)};
  for (const Post& post : posts)
    for (std::size_t i = 0; i < agreed.present.size(); ++i) agreed.present[i] |= post.present()[i];
  return agreed;
}

void Exchange::largest_of_all(std::vector<double>& numbers, std::int64_t step) {
  LargestOfAll largest(*team_->wire(), team_->topology(), tag_of(channel(), Tag::agreement), numbers);
  const auto done = [&] { return largest.done(); };
  const auto awaited = [&] { return largest.awaited(); };
  const bool unsettled = std::exchange(unsettled_, true);  // others may go on to write where this rank fails,
  try {
    meeting_.wait_until(done, awaited, "the agreement of all teams", step, meeting_.limits().between_steps);
  } catch (const PeerError& error) {
    if (error.kind == name_of(Failure::departed)) unsettled_ = unsettled;  // but not without one that left
    throw;
  }
  unsettled_ = unsettled;
  numbers = largest.numbers();
}

Exchange::Agreed Exchange::agree_over_wire(const Call& call, const Post& mine, bool complains) {
  std::vector<std::uint64_t> what = {std::uint64_t(call.operation), mine.header().sequence, call.hash,
                                     std::uint64_t(meeting_.channel())};
  Declarations strict = call.declared;
  const std::uint64_t names = std::exchange(strict[static_cast<std::size_t>(Declared::attached_names)], 0);
  what.insert(what.end(), strict.begin(), strict.end());
  std::vector<double> numbers = {complains ? 1.0 : 0.0};
  add_range(numbers, hash_of_bytes(what.data(), what.size() * sizeof what[0]));
  add_range(numbers, hash_of_bytes(call.doubles.data(), call.doubles.size_bytes()));
  add_range(numbers, hash_of_bytes(call.present.data(), call.present.size_bytes()));
  names == 0 ? add_open_range(numbers) : add_range(numbers, names);
  largest_of_all(numbers, call.step);
  const std::span<const double> ranges = std::span(numbers).subspan(1);
  if (numbers[0] > 0 || !is_one_value(ranges) || !is_one_value(ranges.subspan(3 * kRangeSize)))
    raise_disagreement(mine);
  Agreed agreed{{call.doubles.begin(), call.doubles.end()}, {call.present.begin(), call.present.end()}};
  if (!is_one_value(ranges.subspan(kRangeSize)) || !is_one_value(ranges.subspan(2 * kRangeSize)))
    settle_differences(call, mine, agreed);
  return agreed;
}

// Doubles that differ in their last bits become rank 0's; a layer is present if it is so anywhere.
void Exchange::settle_differences(const Call& call, const Post& mine, Agreed& agreed) {
  const std::size_t doubles = call.doubles.size();
  std::vector<double> numbers;
  for (const double x : call.doubles)
    numbers.insert(numbers.end(), {x, -x, team_->rank() == 0 ? x : -std::numeric_limits<double>::infinity()});
  numbers.insert(numbers.end(), call.present.begin(), call.present.end());
  largest_of_all(numbers, call.step);
  for (std::size_t i = 0; i < doubles; ++i) {
    if (!alike(numbers[3 * i], -numbers[3 * i + 1])) raise_disagreement(mine);
    agreed.doubles[i] = numbers[3 * i + 2];
  }
  for (std::size_t i = 0; i < agreed.present.size(); ++i) agreed.present[i] = numbers[3 * doubles + i] > 0;
}

// All ranks have found that they differ: now every rank sees every post, and names the same culprit.
void Exchange::raise_disagreement(const Post& mine) const {
  const std::size_t size = Post::size(double_names_.size(), layers_);
  auto texts = team_->all_gather({reinterpret_cast<const char*>(mine.at()), size});
  std::vector<Post> all;
  for (std::string& text : texts) {
    if (text.size() != size) throw MismatchError("the ranks are in calls of different engines or arrays");
    all.push_back({reinterpret_cast<std::byte*>(text.data()), double_names_.size(), layers_});
  }
  require_agreement(all, double_names_, team_->topology());
  throw MismatchError("the ranks are in calls of different engines or arrays");
}

}  // namespace xc
