#include <cuda_runtime.h>

#include <type_traits>
#include <vector>

#include "cuda/check.hpp"
#include "cuda/exported.hpp"
#include "cuda/ipc.hpp"
#include "cuda/order.hpp"

namespace xc {
namespace {

using SharedEvent = std::shared_ptr<std::remove_pointer_t<cudaEvent_t>>;
using EventTicket = Ticket<cudaIpcEventHandle_t>;

cudaStream_t cuda(Stream stream) { return static_cast<cudaStream_t>(stream); }

void destroy(cudaEvent_t event) { cudaEventDestroy(event); }

SharedEvent make_shared_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess),
        "creating an event");
  return {event, &destroy};
}

EventTicket ticket_of(cudaEvent_t event) {
  EventTicket ticket{getpid(), reinterpret_cast<std::uint64_t>(event), {}};
  check(cudaIpcGetEventHandle(&ticket.handle, event), "getting an event's handle");
  return ticket;
}

// Of threads in one process the event itself serves.
SharedEvent open(const EventTicket& ticket, const std::shared_ptr<void>& opened) {
  auto event = reinterpret_cast<cudaEvent_t>(ticket.address);
  if (ticket.process == getpid()) return {event, [opened](cudaEvent_t) {}};
  check(cudaIpcOpenEventHandle(&event, ticket.handle), "opening a peer's event");
  return {event, [opened](cudaEvent_t at) { destroy(at); }};
}

// Two events of each rank take turns: the one that a fast rank records next is not the one that a slow rank
// has still to wait for.
class EventOrder final : public Order {
 public:
  explicit EventOrder(Team& team) : exported_(team), place_(std::size_t(team.place())) {
    for (Turn& turn : turns_) {
      EventTicket mine{};
      team.agree<DeviceError>(complaint_of([&] {
        const SharedEvent own = make_shared_event();
        turn.own = std::static_pointer_cast<std::remove_pointer_t<cudaEvent_t>>(exported_.keep(own));
        mine = ticket_of(own.get());
      }));
      const auto tickets = exchange_tickets(team, mine);
      team.agree<DeviceError>(complaint_of([&] {
        for (std::size_t p = 0; p < tickets.size(); ++p)
          if (p != place_) turn.others.push_back(open(tickets[p], exported_.opened(p)));
      }));
    }
  }

  void announce(Stream stream) override {
    now_ = (now_ + 1) % 2;
    xc::check(cudaEventRecord(turns_[now_].own.get(), cuda(stream)), "recording an event");
  }
  void follow(Stream stream) override {
    for (const SharedEvent& event : turns_[now_].others)
      xc::check(cudaStreamWaitEvent(cuda(stream), event.get(), 0), "waiting for an event");
  }

 private:
  struct Turn {
    SharedEvent own;
    std::vector<SharedEvent> others;
  };

  Export exported_;
  std::size_t place_;
  Turn turns_[2];
  int now_ = 0;
};

}  // namespace

std::unique_ptr<Order> make_event_order(Team& team) { return std::make_unique<EventOrder>(team); }

}  // namespace xc
