#include "engine/signature.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "core/hash.hpp"
#include "stages/tables.hpp"

namespace xc {
namespace {

// Flags, and whether there is momentum: both decide which state arrays a group has. The direction of the
// steps is compared as well.
std::string member_line(const EngineOptions& options, std::size_t group) {
  const FamilyInfo& family = families()[static_cast<std::size_t>(family_index(options.rule))];
  const GroupSpec& spec = options.groups[group];
  return "parameter group " + std::to_string(group) + " with flags " + std::to_string(spec.flags) +
         ", kernel " + std::to_string(family.member(spec.flags, spec.hyper)) +
         (spec.maximize ? ", maximized" : "");
}

std::string line_of(const ExtrapolationOptions& options) {
  return options.name + (options.scaled ? ", preconditioned" : ", raw") +
         (options.clipped ? ", clipped" : ", not clipped") + ", seed " + std::to_string(options.seed);
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

std::string line_at(const std::string& text, std::size_t position) {
  const std::size_t begin = position == 0 ? 0 : text.rfind('\n', position - 1) + 1;
  const std::string line = text.substr(begin, text.find('\n', begin) - begin);
  return line.empty() ? "nothing more" : line;
}

}  // namespace

std::vector<std::string> full_signature(const Plan& plan, const EngineOptions& options, const Team& team) {
  std::vector<std::string> lines = {
      "extrapcomm " + options.version,
      std::to_string(team.workers_per_rank()) + " workers per rank",
      options.tile ? "tile " + std::to_string(*options.tile) : "tiles that suit",
      "buckets of " + std::to_string(options.bucket) + " elements",
      "rule " + options.rule,
      "extrapolation " + line_of(options.extrapolation),
      std::to_string(options.groups.size()) + " parameter groups"};
  for (std::size_t g = 0; g < options.groups.size(); ++g) lines.push_back(member_line(options, g));
  for (std::string& line : signature_of(plan)) lines.push_back(std::move(line));
  return lines;
}

// Hashes first, so that the usual case moves few bytes; the texts only to name the first line that differs.
void require_same_signature(const Team& team, const std::vector<std::string>& lines) {
  const std::string mine = joined(lines);
  const auto hashes = team.all_gather(std::to_string(hash_of(mine)));
  if (std::equal(hashes.begin() + 1, hashes.end(), hashes.begin())) return;
  const auto texts = team.all_gather(mine);
  for (std::size_t r = 1; r < texts.size(); ++r) {
    const auto [a, b] = std::mismatch(texts[0].begin(), texts[0].end(), texts[r].begin(), texts[r].end());
    if (a == texts[0].end() && b == texts[r].end()) continue;
    const auto position = static_cast<std::size_t>(a - texts[0].begin());
    throw MismatchError("the ranks build different engines: rank 0 has [" + line_at(texts[0], position) +
                        "], rank " + std::to_string(r) + " has [" + line_at(texts[r], position) + "]");
  }
}

}  // namespace xc
