#pragma once

#include <string>
#include <vector>

#include "comm/team.hpp"
#include "engine/engine.hpp"
#include "engine/plan.hpp"

namespace xc {

// Everything about an engine that must be alike on all ranks, one fact a line.
std::vector<std::string> full_signature(const Plan& plan, const EngineOptions& options, const Team& team);

// Collective. Throws the same MismatchError on every rank, with the first line that differs.
void require_same_signature(const Team& team, const std::vector<std::string>& lines);

}  // namespace xc
