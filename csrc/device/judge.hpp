#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "comm/team.hpp"
#include "device/device.hpp"
#include "device/run_table.hpp"
#include "engine/judge.hpp"
#include "engine/plan.hpp"

namespace xc {

// A team's judge on its devices. Every rank leaves the squares of its part of the mean gradient, cell by
// cell, where the others' devices read them; and every device adds up all of them, so all come to the same
// verdict. The host reads it when it needs it.
class DeviceJudge final : public Judge<float> {
 public:
  // Collective.
  DeviceJudge(Team& team, std::shared_ptr<Device> device, std::shared_ptr<Storage> storage,
              std::shared_ptr<RunTable> runs, const Plan& plan);

  void begin(const Bounds& bounds, std::span<const Run<float>> runs) override;
  void judge() override;
  Verdict verdict() override;

  // Where the squares of the cells from `begin` on go, which is in this rank's part.
  double* squares_from(std::int64_t begin) const;
  const DeviceVerdict* verdict_memory() const { return reinterpret_cast<DeviceVerdict*>(verdict_.get()); }

 private:
  std::size_t cell_at(std::int64_t element) const;

  std::shared_ptr<Device> device_;
  std::shared_ptr<Storage> storage_;
  std::shared_ptr<RunTable> runs_;
  const Plan& plan_;
  std::size_t place_;
  std::vector<std::int64_t> firsts_;  // cells of the team's ranks, and the number of all
  Shared squares_;
  std::shared_ptr<std::byte> pointers_, firsts_there_, verdict_, seen_;
};

}  // namespace xc
