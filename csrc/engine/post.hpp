#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "comm/topology.hpp"

namespace xc {

// A POST is what a rank lays down before meeting A so that all can check that they are about to do the same
// thing: the operation and its number, a complaint if the rank found one with its own arguments, a hash of
// what must be equal, hyper-parameters as doubles, and which layers have a gradient. Two posts per rank are
// kept and used in turn, so a fast rank cannot overwrite what a slow one still reads.

enum class Operation : std::uint32_t {
  step = 1,
  adopt,
  load,
  all_reduce,
  reduce_scatter,
  all_gather,
  broadcast,
  begin_local,
  local_step,
  average,
  collect_state
};

const char* name_of(Operation operation);

inline constexpr std::size_t kComplaintBytes = 480;

// Digests that every rank declares with a step, and that must be equal on all ranks: of rule state that was
// assigned by hand, of the names that attached models give to the parameters, and, with an adoption, of the
// parameters that others wrote before the model loaded the rest. 0: nothing is declared; ranks that have
// attached no model agree with all others.
enum class Declared : std::uint32_t { assigned_state, attached_names, kept_writes, count };
using Declarations = std::array<std::uint64_t, static_cast<std::size_t>(Declared::count)>;

inline std::uint64_t digest_in(const Declarations& declared, Declared what) {
  return declared[static_cast<std::size_t>(what)];
}

inline std::uint64_t declared_names(const Declarations& declared) {
  return declared[static_cast<std::size_t>(Declared::attached_names)];
}

struct PostHeader {
  std::uint64_t sequence;
  std::uint64_t hash;
  Declarations declared;
  std::uint32_t operation;
  std::uint32_t complaint_size;
  char complaint[kComplaintBytes];
};

// A view of one post in shared memory: the header, then doubles, then one byte per layer.
class Post {
 public:
  Post(std::byte* at, std::size_t doubles, std::size_t layers)
      : at_(at), doubles_(doubles), layers_(layers) {}
  static std::size_t size(std::size_t doubles, std::size_t layers);
  PostHeader& header() const { return *reinterpret_cast<PostHeader*>(at_); }
  std::span<double> doubles() const {
    return {reinterpret_cast<double*>(at_ + sizeof(PostHeader)), doubles_};
  }
  std::span<std::uint8_t> present() const {
    return {reinterpret_cast<std::uint8_t*>(at_ + sizeof(PostHeader) + doubles_ * sizeof(double)), layers_};
  }
  const std::byte* at() const { return at_; }
  void complain(const std::string& text) const;
  std::string complaint() const { return {header().complaint, header().complaint_size}; }

 private:
  std::byte* at_;
  std::size_t doubles_;
  std::size_t layers_;
};

// Whether two ranks' values of one number count as the same.
bool alike(double a, double b);

// Throws what the posts of all ranks say is wrong, the same on every rank; returns if they agree. `names` are
// those of the doubles. Doubles agree when they differ from rank 0's by no more than a relative 1e-12:
// schedulers may differ in the last bit between types of processor, and rank 0's are the ones used.
void require_agreement(std::span<const Post> posts, std::span<const std::string> names,
                       const Topology& topology);

}  // namespace xc
