#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <vector>

#include "check.hpp"
#include "comm/team.hpp"
#include "mail.hpp"

// Ranks as forked processes, without MPI. They exchange constructor messages through a page of memory that
// they inherit. Ranks of several teams have a wire.
class Ranks {
 public:
  using Teams = std::vector<std::vector<int>>;

  explicit Ranks(int size, Teams teams = {}) : size_(size), teams_(std::move(teams)), mail_(size) {
    void* at = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    board_ = static_cast<Board*>(at);
    pthread_barrierattr_t attributes;
    pthread_barrierattr_init(&attributes);
    pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&board_->barrier, &attributes, static_cast<unsigned>(size));
  }
  ~Ranks() { munmap(board_, sizeof(Board)); }

  xc::TeamOptions options(int rank, int workers = 1) const {
    xc::TeamOptions options;
    options.topology =
        teams_.empty() ? xc::Topology::one_team(rank, size_, workers) : xc::Topology(rank, workers, teams_);
    if (teams_.size() > 1) options.wire = std::make_shared<MailWire>(mail_, rank);
    options.all_gather = [this, rank](const std::string& mine) { return all_gather(rank, mine); };
    options.interrupted = [] {};
    options.warn = [](const std::string&) {};
    return options;
  }

  // Runs `body` in every rank and returns the processes' exit states as wait() gives them.
  std::vector<int> run(const std::function<void(int rank)>& body) const {
    std::vector<pid_t> children;
    for (int rank = 0; rank < size_; ++rank) {
      const pid_t child = fork();
      if (child == 0) {
        body(rank);
        std::exit(0);
      }
      children.push_back(child);
    }
    std::vector<int> states;
    for (const pid_t child : children) {
      int state = 0;
      waitpid(child, &state, 0);
      states.push_back(state);
    }
    return states;
  }

  void run_well(const std::function<void(int rank)>& body) const {
    for (const int state : run(body)) CHECK(state == 0);
  }

 private:
  static constexpr std::size_t kText = 16384;
  struct Board {
    pthread_barrier_t barrier;
    std::size_t sizes[16];
    char texts[16][kText];
  };

  std::vector<std::string> all_gather(int rank, const std::string& mine) const {
    CHECK(mine.size() <= kText);
    board_->sizes[rank] = mine.size();
    std::memcpy(board_->texts[rank], mine.data(), mine.size());
    pthread_barrier_wait(&board_->barrier);
    std::vector<std::string> all;
    for (int r = 0; r < size_; ++r) all.emplace_back(board_->texts[r], board_->sizes[r]);
    pthread_barrier_wait(&board_->barrier);
    return all;
  }

  int size_;
  Teams teams_;
  Mail mail_;
  Board* board_;
};
