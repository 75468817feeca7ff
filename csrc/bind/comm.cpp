#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bind/register.hpp"
#include "comm/team.hpp"
#include "core/error.hpp"

namespace xc::bind {
namespace {

// Waits run without the interpreter's lock; what they ask of Python takes it for a moment.
// So is their last reference dropped, wherever that happens.
std::shared_ptr<const py::function> held(const py::function& function) {
  return {new py::function(function), [](const py::function* last) {
            const py::gil_scoped_acquire gil;
            delete last;
          }};
}

std::function<std::vector<std::string>(const std::string&)> all_gather_through(const py::function& callback) {
  return [function = held(callback)](const std::string& mine) {
    const py::gil_scoped_acquire gil;
    std::vector<std::string> all;
    for (const py::handle item : (*function)(py::bytes(mine))) all.push_back(item.cast<std::string>());
    return all;
  };
}

void run_signal_handlers() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::function<void(const std::string&)> warn_through(const py::function& callback) {
  return [function = held(callback)](const std::string& text) {
    const py::gil_scoped_acquire gil;
    (*function)(text);
  };
}

// (elements of a chunk or 0, chunks under way, narrow, way, latency, overhead, bandwidth, order)
using RailTuple = std::tuple<std::int64_t, int, bool, std::string, double, double, double, std::string>;

RailOptions rails_from(const RailTuple& tuple) {
  const auto& [chunk, window, narrow, way, latency, overhead, bandwidth, order] = tuple;
  const auto which = way == "direct"    ? RailOptions::Way::direct
                     : way == "halving" ? RailOptions::Way::halving
                                        : RailOptions::Way::automatic;
  const auto sums = order == "nccl" ? RailOptions::Order::nccl : RailOptions::Order::tree;
  return {chunk, window, narrow, which, latency, overhead, bandwidth, sums};
}

std::shared_ptr<Team> make_team(const Topology& topology, std::shared_ptr<Wire> wire, std::int64_t world,
                                std::int64_t first_channel, const RailTuple& rails,
                                const py::function& all_gather, const py::function& warn, double step_timeout,
                                double pass_timeout, double warn_after, const std::string& provider) {
  TeamOptions options;
  options.topology = topology;
  options.wire = std::move(wire);
  options.world = world;
  options.first_channel = first_channel;
  options.rails = rails_from(rails);
  options.provider = provider == "posix" ? Provider::posix : Provider::memfd;
  options.limits = {Seconds(step_timeout), Seconds(pass_timeout), Seconds(warn_after)};
  options.all_gather = all_gather_through(all_gather);
  options.interrupted = &run_signal_handlers;
  options.warn = warn_through(warn);
  return std::make_shared<Team>(std::move(options));
}

}  // namespace

void register_comm(py::module_& module) {
  py::class_<Wire, std::shared_ptr<Wire>>(module, "Wire", "What carries bytes between teams.");
  py::class_<Topology>(module, "Topology", "Which rank is in which team.")
      .def(py::init<int, int, std::vector<std::vector<int>>, std::vector<std::string>>(), py::kw_only(),
           py::arg("rank"), py::arg("workers"), py::arg("teams"), py::arg("hosts"))
      .def_property_readonly("teams", &Topology::teams)
      .def_property_readonly("keeps_order", &Topology::keeps_order);
  py::class_<Team, std::shared_ptr<Team>>(module, "Team", "The ranks that opened each other's memory.")
      .def(py::init(&make_team), py::kw_only(), py::arg("topology"), py::arg("wire"), py::arg("world"),
           py::arg("first_channel"), py::arg("rails"), py::arg("all_gather"), py::arg("warn"),
           py::arg("step_timeout"), py::arg("pass_timeout"), py::arg("warn_after"), py::arg("provider"))
      .def_property_readonly("channels", &Team::channels)
      .def("alive", &Team::alive, py::arg("place"))
      .def("departed", &Team::departed, py::arg("place"))
      .def("farewell", &Team::farewell, py::arg("place"))
      .def("departure_elsewhere", &Team::departure_elsewhere)
      .def("leave", &Team::leave, py::arg("reason") = "");
}

}  // namespace xc::bind
