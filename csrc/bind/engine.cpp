#include "engine/engine.hpp"

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bind/dlpack.hpp"
#include "bind/gradients.hpp"
#include "bind/register.hpp"
#include "bind/view.hpp"
#include "core/error.hpp"
#include "device/device.hpp"
#include "device/host.hpp"
#include "engine/shared_array.hpp"

namespace xc::bind {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style | py::array::forcecast>;

template <class A>
auto span_of(const A& array) {
  return std::span(array.data(), static_cast<std::size_t>(array.size()));
}

// (name, dtype, shape, strides in elements, group)
using LayerTuple =
    std::tuple<std::string, std::string, std::vector<std::int64_t>, std::vector<std::int64_t>, int>;

std::vector<LayerSpec> layers_from(const std::vector<LayerTuple>& tuples) {
  std::vector<LayerSpec> layers;
  for (const auto& [name, dtype, shape, strides, group] : tuples)
    layers.push_back({name, dtype_from(dtype), shape, strides, group});
  return layers;
}

// (flags as bits, hyper-parameters, whether gradients are negated)
using GroupTuple = std::tuple<unsigned, std::vector<double>, bool>;

std::vector<GroupSpec> groups_from(const std::vector<GroupTuple>& tuples) {
  std::vector<GroupSpec> groups;
  for (const auto& [flags, hyper, maximize] : tuples) groups.push_back({flags, hyper, maximize});
  return groups;
}

// (name, in units of the rule's steps, clipped, seed)
using ExtrapolationTuple = std::tuple<std::string, bool, bool, std::uint64_t>;

std::unique_ptr<Engine> make_engine(std::shared_ptr<Team> team, const std::vector<LayerTuple>& layers,
                                    const std::vector<GroupTuple>& groups, const std::string& rule,
                                    const ExtrapolationTuple& extrapolation, std::optional<std::int64_t> tile,
                                    const std::string& version, std::optional<bool> streaming,
                                    std::int64_t bucket, std::shared_ptr<Device> device) {
  const auto specs = layers_from(layers);
  const auto& [name, scaled, clipped, seed] = extrapolation;
  const EngineOptions options{.rule = rule,
                              .extrapolation = {name, scaled, clipped, seed},
                              .groups = groups_from(groups),
                              .tile = tile,
                              .streaming = streaming,
                              .bucket = bucket,
                              .version = version};
  const py::gil_scoped_release nogil;
  return Engine::create(std::move(team), specs, options, std::move(device));
}

// One of this rank's workers.
int checked_worker(const Engine& engine, int v) {
  if (v < 0 || v >= engine.team().workers_per_rank())
    throw UsageError("there is no worker " + std::to_string(v));
  return v;
}

View view_of(const Engine& engine, const std::shared_ptr<std::byte>& base, std::size_t layer) {
  const Layer& l = engine.plan().layers.at(layer);
  const Device* const device = engine.device();
  const Device::Place place = device ? device->place() : Device::Place{dlpack::kCpu, 0};
  return {{base, base.get() + l.byte_begin}, l.spec.dtype, l.spec.shape, l.spec.strides, place};
}

// A contiguous array of the master type, of the layer's elements in the order of memory, or of a part of
// them.
py::array read(const Engine& engine, std::size_t layer, int slot,
               std::optional<std::pair<std::int64_t, std::int64_t>> part) {
  const bool is_double = engine.plan().master == DType::f64;
  const std::int64_t count = engine.plan().layers.at(layer).count;
  const auto [from, to] = part.value_or(std::pair(std::int64_t{0}, count));
  if (slot < 0 || slot > engine.slots()) throw UsageError("there is no slot " + std::to_string(slot));
  if (from < 0 || from > to || to > count) throw UsageError("a parameter has no such part");
  py::array out(is_double ? py::dtype::of<double>() : py::dtype::of<float>(), to - from);
  engine.read(layer, slot, from, to, out.mutable_data());
  return out;
}

// A Python function of hyper-parameters and statistics, for the engine, which calls it without the lock.
using Revision = std::function<Doubles(Doubles, Doubles)>;

Doubles array_of(std::span<const double> numbers) {
  return Doubles(static_cast<py::ssize_t>(numbers.size()), numbers.data());
}

auto unlocked(const Revision& revise) {
  return [&revise](std::span<const double> hyper, std::span<const double> sums) {
    const py::gil_scoped_acquire gil;
    const Doubles revised = revise(array_of(hyper), array_of(sums));
    if (revised.size() != static_cast<py::ssize_t>(hyper.size()))
      throw UsageError("revised hyper-parameters must be as many as before");
    const auto numbers = span_of(revised);
    return std::vector<double>(numbers.begin(), numbers.end());
  };
}

void require_complete(const Engine& engine, const Doubles& hyper, const Bytes& present) {
  const auto layers = py::ssize_t(engine.plan().layers.size());
  if (hyper.size() != py::ssize_t(engine.hyper_count()) ||
      present.size() != layers * engine.team().workers_per_rank())
    throw UsageError("step takes every group's numbers, and a mark for each worker and layer");
}

// (the norm of the mean gradient if the step was to know it, whether it was skipped, its statistics)
using OutcomeTuple = std::tuple<std::optional<double>, bool, std::vector<double>>;

OutcomeTuple step(Engine& engine, const Doubles& hyper, const Bytes& present, bool fused, double divisor,
                  double max_norm, bool skip_nonfinite, Observe observe,
                  const std::optional<Revision>& revise, const std::array<double, 4>& gain,
                  const std::optional<Revision>& revise_rule) {
  require_complete(engine, hyper, present);
  if (observe == Observe::before && !revise) throw UsageError("statistics before the step are for `revise`");
  Engine::Step arguments{span_of(hyper), span_of(present), fused, divisor, max_norm,
                         skip_nonfinite, observe,          {},    gain};
  if (revise) arguments.revise = unlocked(*revise);
  if (revise_rule) arguments.revise_rule = unlocked(*revise_rule);
  Engine::Outcome outcome;
  {
    const py::gil_scoped_release nogil;
    outcome = engine.step(arguments);
  }
  return {outcome.norm, outcome.skipped, outcome.statistics};
}

std::tuple<std::optional<double>, bool> outcome_of(Engine& engine) {
  Engine::Outcome outcome;
  {
    const py::gil_scoped_release nogil;
    outcome = engine.outcome();
  }
  return {outcome.norm, outcome.skipped};
}

// The kind of local step that `kStep` is.
template <void (Engine::*kStep)(const Engine::Step&)>
void local_step(Engine& engine, const Doubles& hyper, const Bytes& present, double divisor) {
  require_complete(engine, hyper, present);
  const Engine::Step arguments{.hyper = span_of(hyper), .present = span_of(present), .divisor = divisor};
  const py::gil_scoped_release nogil;
  (engine.*kStep)(arguments);
}

void prepare_replay(Engine& engine, const Doubles& hyper, const Bytes& present, double divisor,
                    double max_norm, bool skip_nonfinite) {
  require_complete(engine, hyper, present);
  const Engine::Step arguments{.hyper = span_of(hyper),
                               .present = span_of(present),
                               .divisor = divisor,
                               .max_norm = max_norm,
                               .skip_nonfinite = skip_nonfinite};
  const py::gil_scoped_release nogil;
  engine.prepare_replay(arguments);
}

void gather(Engine& engine, int v, const Sources& sources, Bytes& present) {
  const auto list = sources_from(sources, engine.plan());
  if (present.size() != py::ssize_t(list.size())) throw UsageError("gather takes one mark for each layer");
  const std::span<std::uint8_t> marks(present.mutable_data(), list.size());
  const py::gil_scoped_release nogil;
  engine.gather(checked_worker(engine, v), list, marks);
}

// (weights or None, [slot or None, ...], updates) for every layer; arrays of the master type.
using SavedTuple = std::tuple<std::optional<py::array>, std::vector<std::optional<py::array>>, std::int64_t>;

const void* checked(const Engine& engine, const std::optional<py::array>& array, std::size_t layer) {
  if (!array) return nullptr;
  const bool is_double = engine.plan().master == DType::f64;
  if (!array->dtype().equal(is_double ? py::dtype::of<double>() : py::dtype::of<float>()))
    throw UsageError("a checkpoint's arrays must have the master type");
  if (array->size() != engine.plan().layers[layer].count || !(array->flags() & py::array::c_style))
    throw UsageError("a checkpoint's array has another size than its parameter");
  return array->data();
}

void load(Engine& engine, const std::vector<SavedTuple>& tuples, std::uint64_t hash) {
  if (tuples.size() != engine.plan().layers.size())
    throw UsageError("a checkpoint must have every parameter");
  std::vector<Engine::Saved> layers;
  for (const auto& [weights, slots, updates] : tuples) {
    const std::size_t layer = layers.size();
    Engine::Saved saved{checked(engine, weights, layer), {}, updates};
    for (const auto& slot : slots) saved.slots.push_back(checked(engine, slot, layer));
    if (static_cast<int>(saved.slots.size()) != (updates < 0 ? 0 : engine.slots()))
      throw UsageError("a checkpoint has other slots");
    layers.push_back(std::move(saved));
  }
  const py::gil_scoped_release nogil;
  engine.load(layers, hash);
}

std::vector<std::tuple<std::int64_t, std::int64_t, int>> segments(const Engine& engine) {
  std::vector<std::tuple<std::int64_t, std::int64_t, int>> list;
  for (const Segment& s : engine.plan().segments) list.emplace_back(s.begin, s.end, s.owner);
  return list;
}

void register_engine_class(py::module_& module) {
  using Free = py::call_guard<py::gil_scoped_release>;
  py::enum_<Observe>(module, "Observe")
      .value("nothing", Observe::nothing)
      .value("before", Observe::before)
      .value("along", Observe::along);
  py::enum_<Declared>(module, "Declared")
      .value("assigned_state", Declared::assigned_state)
      .value("attached_names", Declared::attached_names)
      .value("kept_writes", Declared::kept_writes);
  py::class_<Engine>(module, "Engine", "The fused step on one set of parameters.")
      .def(py::init(&make_engine), py::arg("team"), py::arg("layers"), py::arg("groups"), py::arg("rule"),
           py::arg("extrapolation"), py::arg("tile"), py::arg("version"), py::arg("streaming") = py::none(),
           py::arg("bucket") = std::int64_t{0}, py::arg("device") = py::none())
      .def("weights", [](const Engine& e, int v,
                         std::size_t layer) { return view_of(e, e.weights(checked_worker(e, v)), layer); })
      .def("gradients",
           [](const Engine& e, int v, std::size_t layer) {
             return view_of(e, e.gradients(checked_worker(e, v)), layer);
           })
      .def_property_readonly("device",
                             [](const Engine& e) -> std::optional<std::string> {
                               return e.device() ? std::optional(e.device()->name()) : std::nullopt;
                             })
      .def_property_readonly("captures", [](const Engine& e) { return e.device() && e.device()->captures(); })
      .def("segments", &segments, "(begin, end, owner) of every worker's part of the flat parameters.")
      .def("owned", &Engine::owned, py::arg("layer"), "(begin, end) of this rank's part of a layer.")
      .def("gather", &gather, py::arg("worker"), py::arg("sources").noconvert(),
           py::arg("present").noconvert())
      .def("gradient_reader", &GradientReader::make, py::arg("tensor_types"), py::keep_alive<0, 1>(),
           "Reads .grad of torch's tensors; None if this torch has no table for that.")
      .def(
          "touch",
          [](Engine& e, int v, std::size_t layer) {
            if (layer < e.plan().layers.size()) e.touch(checked_worker(e, v), layer);
          },
          py::arg("worker"), py::arg("layer"))
      .def("finished", &Engine::finished, py::arg("worker"), py::arg("layer"), Free())
      .def("changed", &Engine::changed, py::arg("worker"), py::arg("layer"))
      .def_property_readonly("early_part", &Engine::early_part)
      .def("adopt", &Engine::adopt, py::arg("root_worker"), Free())
      .def("load", &load, py::arg("layers"), py::arg("hash"))
      .def("step", &step, py::arg("hyper"), py::arg("present"), py::arg("fused") = true,
           py::arg("divisor") = 1.0, py::arg("max_norm") = 0.0, py::arg("skip_nonfinite") = false,
           py::arg("observe") = Observe::nothing, py::arg("revise") = py::none(),
           py::arg("gain") = std::array<double, 4>{}, py::arg("revise_rule") = py::none())
      .def_property_readonly("outcome", &outcome_of,
                             "The last step's norm, if it was to know it, and whether it was skipped.")
      .def("prepare_replay", &prepare_replay, py::arg("hyper"), py::arg("present"), py::arg("divisor"),
           py::arg("max_norm"), py::arg("skip_nonfinite"))
      .def("declare", &Engine::declare, py::arg("what"), py::arg("digest"),
           "The ranks compare this digest with every step from now on.")
      .def("complain", &Engine::complain, Free())
      .def("begin_local", &Engine::begin_local, Free())
      .def("local_step", &local_step<&Engine::local_step>, py::arg("hyper"), py::arg("present"),
           py::arg("divisor"))
      .def("averaging_step", &local_step<&Engine::averaging_step>, py::arg("hyper"), py::arg("present"),
           py::arg("divisor"))
      .def("average", &Engine::average, Free())
      .def_property_readonly("local_steps", &Engine::local_steps)
      .def(
          "show_master", [](Engine& e, int v) { e.show_master(checked_worker(e, v)); }, Free())
      .def("hide_master", &Engine::hide_master, Free())
      .def("keep_master", &Engine::keep_master)
      .def("watch_writes", &Engine::watch_writes)
      .def(
          "written",
          [](const Engine& e, int v, std::size_t begin, std::size_t end) {
            return e.written(checked_worker(e, v), begin, end);
          },
          py::arg("worker"), py::arg("begin") = 0, py::arg("end") = SIZE_MAX,
          "The first layer, of those from `begin` to before `end`, in which somebody else was seen to write, "
          "or None.")
      .def("displaced", &Engine::displaced, py::arg("layer"))
      .def("updates", &Engine::updates, py::arg("layer"), Free())
      .def("begun", &Engine::begun, py::arg("layer"), Free())
      .def_property_readonly("most_updates", py::cpp_function(&Engine::most_updates, Free()))
      .def_property_readonly("slots", &Engine::slots)
      .def("collect_state", &Engine::collect_state, py::arg("only_rank"), Free())
      .def("forget_collected", &Engine::forget_collected)
      .def("read", &read, py::arg("layer"), py::arg("slot"), py::arg("part") = py::none())
      .def("close", &Engine::close, Free())
      .def_property_readonly("way", &Engine::way)
      .def_property_readonly("steps", &Engine::steps)
      .def_property_readonly("last_step_seconds", &Engine::last_step_seconds)
      .def_property_readonly("streaming", &Engine::streaming)
      .def_property_readonly("tile", &Engine::tile);
}

std::unique_ptr<SharedArray> make_array(std::shared_ptr<Team> team, const std::string& dtype,
                                        std::int64_t count) {
  const DType type = dtype_from(dtype);
  const py::gil_scoped_release nogil;
  return std::make_unique<SharedArray>(std::move(team), type, count);
}

void register_shared_array(py::module_& module) {
  using Free = py::call_guard<py::gil_scoped_release>;
  py::enum_<Reduction>(module, "Reduction").value("sum", Reduction::sum).value("mean", Reduction::mean);
  py::enum_<Operation>(module, "Operation")
      .value("all_reduce", Operation::all_reduce)
      .value("reduce_scatter", Operation::reduce_scatter)
      .value("all_gather", Operation::all_gather)
      .value("broadcast", Operation::broadcast);
  py::class_<SharedArray>(module, "SharedArray", "One array per worker, with collectives on them.")
      .def(py::init(&make_array), py::arg("team"), py::arg("dtype"), py::arg("count"))
      .def("view", [](const SharedArray& a,
                      int v) { return View{a.view(v), a.dtype(), {a.count()}, {1}, {dlpack::kCpu, 0}}; })
      .def("block", [](const SharedArray& a, int k) { return std::pair(a.block(k).begin, a.block(k).end); })
      .def("all_reduce", &SharedArray::all_reduce, Free())
      .def("reduce_scatter", &SharedArray::reduce_scatter, Free())
      .def("all_gather", &SharedArray::all_gather, Free())
      .def("broadcast", &SharedArray::broadcast, Free())
      .def("complain", &SharedArray::complain, Free())
      .def("close", &SharedArray::close, Free());
}

void register_device(py::module_& module) {
  py::class_<Device, std::shared_ptr<Device>>(module, "Device", "Memory and kernels that are not the CPU's.")
      .def_property_readonly("name", &Device::name)
      .def(
          "use", [](Device& d, std::uintptr_t stream) { d.use(reinterpret_cast<Stream>(stream)); },
          py::arg("stream"), "Queue what follows on this stream.");
  py::class_<HostDevice, Device, std::shared_ptr<HostDevice>>(module, "HostDevice",
                                                              "The host as a device, for tests.")
      .def(py::init())
      .def("begin_capture", &HostDevice::begin_capture)
      .def("end_capture", &HostDevice::end_capture)
      .def("replay", &HostDevice::replay);
}

}  // namespace

void register_engine(py::module_& module) {
  register_device(module);
  register_engine_class(module);
  register_shared_array(module);
}

}  // namespace xc::bind
