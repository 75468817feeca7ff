#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/dtype.hpp"
#include "engine/exchange.hpp"
#include "engine/plan.hpp"
#include "engine/rails.hpp"

namespace xc {

enum class Reduction : std::uint8_t { sum, mean };

// One array per worker, all of the same size and type, in shared memory, with the plain collectives on them.
// They are the engine's stages without a rule: each worker sums, or copies, its own block and publishes it.
// In place; sums are the same tree over the workers as in a step, in the master type. Between teams they go
// by the rails.
class SharedArray {
 public:
  SharedArray(std::shared_ptr<Team> team, DType dtype, std::int64_t count);  // collective

  std::shared_ptr<std::byte> view(int v) const;
  const Segment& block(int worker) const { return plan_.segments[static_cast<std::size_t>(worker)]; }
  Team& team() const { return exchange_.team(); }
  DType dtype() const { return dtype_; }
  std::int64_t count() const { return count_; }

  void all_reduce(Reduction reduction);      // every worker's array becomes the sum or mean of all
  void reduce_scatter(Reduction reduction);  // every worker's own block does; the rest is untouched
  void all_gather();                         // every block becomes what its owner has there
  void broadcast(int root_worker);           // every array becomes the root's
  void complain(Operation operation, const std::string& complaint);
  void close();

 private:
  template <class T>
  void walk_blocks(double scale, int root);
  template <class T>
  void ride(double scale, int root);
  template <class T>
  Rails<T>& rails();
  std::byte* array_of(int worker) const;
  void run(Operation operation, std::uint64_t hash, double scale, int root);

  DType dtype_;
  std::int64_t count_;
  std::size_t control_bytes_;
  std::size_t stride_;
  Shared memory_;
  Exchange exchange_;
  Plan plan_;                            // of segments alone: worker k's block is the k-th
  std::vector<std::byte*> arrays_;       // of the team's workers
  std::unique_ptr<Rails<float>> rails_;  // of one of them, with several teams
  std::unique_ptr<Rails<double>> wide_rails_;
  Operation operation_{};
  std::int64_t calls_ = 0;
};

}  // namespace xc
