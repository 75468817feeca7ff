#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "check.hpp"
#include "comm/wire.hpp"

// A wire without MPI, between threads or forked processes. From every rank to every other there is a box that
// holds one frame: long messages travel in many, nothing moves unless somebody asks, and a send reads its
// bytes as late as it can.
class Mail {
 public:
  static constexpr std::size_t kFrame = 3000;
  static constexpr std::size_t kWords = 64;
  struct Box {
    std::atomic<int> full;
    int tag;
    std::size_t total;  // bytes of the whole message
    std::byte bytes[kFrame];
  };
  struct Word {
    std::atomic<int> full;
    std::byte bytes[xc::Wire::kNoticeBytes];
  };
  struct Route {
    Box box;
    Word words[kWords];
  };

  explicit Mail(int size) : size_(size) {
    void* at = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    routes_ = static_cast<Route*>(at);
  }
  ~Mail() { munmap(routes_, bytes()); }
  Mail(const Mail&) = delete;
  Mail& operator=(const Mail&) = delete;

  int size() const { return size_; }
  Route& route(int from, int to) const { return routes_[from * size_ + to]; }

 private:
  std::size_t bytes() const { return sizeof(Route) * static_cast<std::size_t>(size_ * size_); }
  int size_;
  Route* routes_;
};

class MailWire final : public xc::Wire {
 public:
  MailWire(const Mail& mail, int rank)
      : mail_(mail), rank_(rank), outgoing_(std::size_t(mail.size())), incoming_(std::size_t(mail.size())) {}

  Transfer send(const void* from, std::size_t bytes, int rank, int tag) override {
    outgoing_[std::size_t(rank)].push_back({++last_, static_cast<const std::byte*>(from), bytes, 0, tag});
    under_way_.insert(last_);
    return last_;
  }

  Transfer receive(void* to, std::size_t bytes, int rank, int tag) override {
    wanted_.push_back({++last_, static_cast<std::byte*>(to), bytes, rank, tag});
    under_way_.insert(last_);
    return last_;
  }

  bool done(Transfer transfer) override {
    progress();
    CHECK(under_way_.count(transfer) == 1);
    if (ended_.erase(transfer) == 0) return false;
    under_way_.erase(transfer);
    return true;
  }

  void progress() override {
    for (int rank = 0; rank < mail_.size(); ++rank) {
      put_frame(rank);
      take_frame(rank);
    }
    wanted_.remove_if([this](const Wanted& wanted) { return deliver(wanted); });
  }

  void notify(int rank, const void* bytes) override {
    for (Mail::Word& word : mail_.route(rank_, rank).words) {
      if (word.full.load(std::memory_order_acquire)) continue;
      std::memcpy(word.bytes, bytes, kNoticeBytes);
      word.full.store(1, std::memory_order_release);
      return;
    }
    CHECK(!"a place for a word");
  }

  bool notice(void* bytes) override {
    for (int rank = 0; rank < mail_.size(); ++rank)
      for (Mail::Word& word : mail_.route(rank, rank_).words) {
        if (!word.full.load(std::memory_order_acquire)) continue;
        std::memcpy(bytes, word.bytes, kNoticeBytes);
        word.full.store(0, std::memory_order_release);
        return true;
      }
    return false;
  }

 private:
  struct Letter {
    Transfer transfer;
    const std::byte* from;
    std::size_t bytes;
    std::size_t sent;
    int tag;
  };
  struct Wanted {
    Transfer transfer;
    std::byte* to;
    std::size_t bytes;
    int rank;
    int tag;
  };

  void put_frame(int rank) {
    auto& letters = outgoing_[std::size_t(rank)];
    Mail::Box& box = mail_.route(rank_, rank).box;
    if (letters.empty() || box.full.load(std::memory_order_acquire)) return;
    Letter& letter = letters.front();
    const std::size_t count = std::min(letter.bytes - letter.sent, Mail::kFrame);
    std::memcpy(box.bytes, letter.from + letter.sent, count);
    box.tag = letter.tag;
    box.total = letter.bytes;
    box.full.store(1, std::memory_order_release);
    letter.sent += count;
    if (letter.sent < letter.bytes) return;
    ended_.insert(letter.transfer);
    letters.pop_front();
  }

  void take_frame(int rank) {
    Mail::Box& box = mail_.route(rank, rank_).box;
    if (!box.full.load(std::memory_order_acquire)) return;
    std::vector<std::byte>& message = incoming_[std::size_t(rank)];
    const std::size_t count = std::min(box.total - message.size(), Mail::kFrame);
    message.insert(message.end(), box.bytes, box.bytes + count);
    if (message.size() == box.total) {
      arrived_[{rank, box.tag}].push_back(std::move(message));
      message.clear();
    }
    box.full.store(0, std::memory_order_release);
  }

  bool deliver(const Wanted& wanted) {
    auto& messages = arrived_[{wanted.rank, wanted.tag}];
    if (messages.empty()) return false;
    CHECK(messages.front().size() == wanted.bytes);
    std::memcpy(wanted.to, messages.front().data(), wanted.bytes);
    messages.pop_front();
    ended_.insert(wanted.transfer);
    return true;
  }

  const Mail& mail_;
  int rank_;
  Transfer last_ = 0;
  std::set<Transfer> under_way_;
  std::set<Transfer> ended_;
  std::vector<std::deque<Letter>> outgoing_;
  std::vector<std::vector<std::byte>> incoming_;
  std::list<Wanted> wanted_;
  std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> arrived_;
};
