#include "engine/post.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/error.hpp"

namespace xc {
namespace {

std::string number(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

std::string call(const Post& post) {
  return std::string(name_of(static_cast<Operation>(post.header().operation))) + " (call " +
         std::to_string(post.header().sequence) + ")";
}

void require_same_call(const Post& first, const Post& other, const std::string& rank) {
  const PostHeader &a = first.header(), &b = other.header();
  const auto differ = [&](Declared what) {
    return digest_in(a.declared, what) != digest_in(b.declared, what);
  };
  if (differ(Declared::assigned_state))
    throw MismatchError("rank 0 and " + rank +
                        " have changed the optimizer's state by hand, but not alike: assign to opt.state, or "
                        "call load_extra_state_dict(), with the same values on every rank");
  if (a.operation == b.operation && differ(Declared::kept_writes))
    throw MismatchError("before model.load_state_dict(), rank 0 and " + rank +
                        " wrote into different parameters that were not loaded then: call opt.adopt() after "
                        "changing weights on every rank, or change them in master_weights(write=True)");
  if (a.operation != b.operation || a.sequence != b.sequence)
    throw MismatchError("rank 0 is in " + call(first) + " but " + rank + " is in " + call(other) +
                        "; every rank must make the same collective calls in the same order");
  if (a.hash != b.hash)
    throw MismatchError("rank 0 and " + rank + " call " + call(first) + " with different options");
}

// Ranks that have attached no model have declared nothing.
void require_same_names(std::span<const Post> posts, const Topology& topology) {
  const Post* first = nullptr;
  const auto name = [&](const Post& post) {
    return topology.name_of(static_cast<int>(&post - posts.data()));
  };
  for (const Post& post : posts) {
    const std::uint64_t names = declared_names(post.header().declared);
    if (names == 0) continue;
    if (!first) first = &post;
    if (names != declared_names(first->header().declared))
      throw MismatchError(
          name(*first) + " and " + name(post) +
          " have attached models that name the optimizer's parameters in different orders, so "
          "layers would be exchanged: hand the parameters over in the same order on every "
          "rank, as model.parameters() gives them; a set has another order in every process");
  }
}

void require_same_doubles(const Post& first, const Post& other, const std::string& rank,
                          std::span<const std::string> names) {
  for (std::size_t i = 0; i < names.size(); ++i) {
    const double a = first.doubles()[i], b = other.doubles()[i];
    if (!alike(a, b))
      throw MismatchError(names[i] + " is " + number(a) + " on rank 0 but " + number(b) + " on " + rank);
  }
}

}  // namespace

bool alike(double a, double b) {
  return a == b || (std::isfinite(a - b) && std::abs(a - b) <= 1e-12 * std::max(std::abs(a), std::abs(b)));
}

const char* name_of(Operation operation) {
  static constexpr const char* kNames[] = {"?",
                                           "step",
                                           "adopt",
                                           "load_state_dict",
                                           "all_reduce",
                                           "reduce_scatter",
                                           "all_gather",
                                           "broadcast",
                                           "the switch to local steps",
                                           "a local step that averages",
                                           "average",
                                           "state_dict"};
  return kNames[static_cast<std::uint32_t>(operation)];
}

std::size_t Post::size(std::size_t doubles, std::size_t layers) {
  return (sizeof(PostHeader) + doubles * sizeof(double) + layers + 63) / 64 * 64;
}

void Post::complain(const std::string& text) const {
  header().complaint_size = static_cast<std::uint32_t>(whole_characters(text, kComplaintBytes));
  std::memcpy(header().complaint, text.data(), header().complaint_size);
}

void require_agreement(std::span<const Post> posts, std::span<const std::string> names,
                       const Topology& topology) {
  const auto name = [&](std::size_t rank) { return topology.name_of(static_cast<int>(rank)); };
  for (std::size_t r = 0; r < posts.size(); ++r)
    if (posts[r].header().complaint_size > 0)
      throw UsageError((posts.size() > 1 ? name(r) + ": " : "") + posts[r].complaint());
  for (std::size_t r = 1; r < posts.size(); ++r) require_same_call(posts[0], posts[r], name(r));
  require_same_names(posts, topology);
  for (std::size_t r = 1; r < posts.size(); ++r) require_same_doubles(posts[0], posts[r], name(r), names);
}

}  // namespace xc
