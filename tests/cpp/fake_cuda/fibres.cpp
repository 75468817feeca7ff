#include <ucontext.h>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.hpp"
#include "switches.hpp"

// The threads of a block. A fibre takes one thread after the other until one comes to a barrier: then it
// stays there, and another fibre goes on. When all threads of the block have come, all go on. So only
// barriers cost fibres.

namespace {

constexpr std::size_t kStack = std::size_t{256} << 10;
constexpr std::size_t kKept = 256;  // sanitizers can tell some thousands apart, of all streams together

class Block {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    threads_ = threads;
    body_ = &body;
    next_ = 0;
    while (next_ < threads_) resume(idle());
    while (!waiting_.empty()) release();
    if (all_.size() > kKept) end();
  }

  void barrier() {
    const uint3 mine = threadIdx;
    Fibre& self = *running_;
    waiting_.push_back(&self);
    leave(self);
    threadIdx = mine;
  }

 private:
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    switches::Fibre known;
  };

  // All are idle.
  void end() {
    for (const auto& fibre : all_) switches::end(fibre->known);
    idle_.clear();
    all_.clear();
  }

  Fibre& idle() {
    if (idle_.empty()) idle_.push_back(make());
    Fibre* const fibre = idle_.back();
    idle_.pop_back();
    return *fibre;
  }

  Fibre* make() {
    auto fibre = std::make_unique<Fibre>();
    getcontext(&fibre->context);
    fibre->context.uc_stack.ss_sp = fibre->stack.get();
    fibre->context.uc_stack.ss_size = kStack;
    fibre->context.uc_link = nullptr;
    makecontext(&fibre->context, &Block::begin, 0);
    fibre->known = switches::make(fibre->stack.get(), kStack);
    all_.push_back(std::move(fibre));
    return all_.back().get();
  }

  void release() {
    if (waiting_.size() != threads_) {
      std::fprintf(stderr, "fake CUDA: %zu of %u threads came to a barrier\n", waiting_.size(), threads_);
      std::abort();
    }
    const std::vector<Fibre*> going = std::move(waiting_);
    waiting_.clear();
    for (Fibre* const fibre : going) resume(*fibre);
  }

  void resume(Fibre& fibre) {
    running_ = &fibre;
    switches::Leaving leaving = switches::to(main_, fibre.known);
    swapcontext(&own_, &fibre.context);
    switches::arrived(main_, leaving);
  }
  void leave(Fibre& fibre) {
    switches::Leaving leaving = switches::to(fibre.known, main_);
    swapcontext(&fibre.context, &own_);
    switches::arrived(fibre.known, leaving);
  }

  static void begin();
  [[noreturn]] void work() {
    for (;;) {
      Fibre& self = *running_;
      while (next_ < threads_) {
        threadIdx = {next_++, 0, 0};
        (*body_)();
      }
      idle_.push_back(&self);
      leave(self);
    }
  }

  unsigned threads_ = 0, next_ = 0;
  const std::function<void()>* body_ = nullptr;
  ucontext_t own_;
  switches::Fibre main_ = switches::present();
  Fibre* running_ = nullptr;
  std::vector<std::unique_ptr<Fibre>> all_;
  std::vector<Fibre*> idle_, waiting_;
};

Block& block() {
  thread_local Block* const block = new Block;  // a stream's thread never ends
  return *block;
}

void Block::begin() {
  switches::began();
  block().work();
}

}  // namespace

void __syncthreads() { block().barrier(); }

void __nanosleep(unsigned nanoseconds) { std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds)); }

// The last block first, as no order is promised.
void fake_cuda_run(dim3 grid, dim3 size, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = size;
  for (unsigned b = grid.x; b-- > 0;) {
    blockIdx = {b, 0, 0};
    block().run(size.x, thread);
  }
}
