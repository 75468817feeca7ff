#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bind/register.hpp"
#include "core/error.hpp"
#include "core/float_environment.hpp"
#include "core/streaming.hpp"
#include "engine/ways.hpp"
#include "rules/extrapolation.hpp"
#include "stages/tables.hpp"

namespace xc::bind {
namespace {

py::dict describe_rules() {
  py::dict rules;
  for (const FamilyInfo& family : families()) {
    py::dict parameters;
    for (const Parameter& p : family.parameters) parameters[py::str(std::string(p.name))] = p.preset;
    py::dict rule;
    rule["parameters"] = parameters;
    rule["flags"] = std::vector<std::string>(family.flags.begin(), family.flags.end());
    rule["slots"] = std::vector<std::string>(family.slot_names.begin(), family.slot_names.end());
    rule["measures"] = family.measures;
    rule["projects"] = family.projects;
    rule["factor"] = family.has_factor;
    rule["revises"] = family.revises;
    rules[py::str(std::string(family.name))] = rule;
  }
  return rules;
}

// Conversions of the 16-bit types, as the stages do them.
template <class E>
py::array_t<float> widened(
    const py::array_t<std::uint16_t, py::array::c_style | py::array::forcecast>& bits) {
  py::array_t<float> out(bits.size());
  for (py::ssize_t i = 0; i < bits.size(); ++i) out.mutable_data()[i] = widen(E{bits.data()[i]});
  return out;
}

template <class E>
py::array_t<std::uint16_t> narrowed(
    const py::array_t<float, py::array::c_style | py::array::forcecast>& values) {
  py::array_t<std::uint16_t> out(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) out.mutable_data()[i] = narrow<E>(values.data()[i]).bits;
  return out;
}

Noise noise_named(const std::string& kind) {
  if (kind == "gaussian") return Noise::gaussian;
  if (kind == "uniform") return Noise::uniform;
  throw UsageError("noise: there is no kind '" + kind + "'; choose 'gaussian' or 'uniform'");
}

py::array_t<float> noise(const std::string& kind, std::uint64_t seed, std::uint32_t step,
                         std::uint32_t worker, std::int64_t first, std::int64_t count) {
  const Noise chosen = noise_named(kind);
  if (first < 0 || count < 0) throw UsageError("noise: first and count must not be negative");
  py::array_t<float> numbers(count);
  const FloatEnvironment environment;
  make_noise(chosen, {seed, step, worker}, first, count, numbers.mutable_data());
  return numbers;
}

}  // namespace

void register_stages(py::module_& module) {
  module.def("build_info", [] {
    py::dict info;
    info["compiler"] = "C++ compiler " __VERSION__;
    info["instruction_set"] = std::string(instruction_set());
    info["store_bytes"] = std::to_string(static_cast<int>(usual_store()));
    const auto tile = asked_tile();
    info["tile"] = tile ? std::to_string(*tile) + " elements, by XC_TILE" : "found out in the first steps";
    return info;
  });
  module.def("rules", &describe_rules, "Rule name to its hyper-parameters with presets, flags and slots.");
  module.def("extrapolations", [] {
    std::vector<std::string> names;
    for (const Extrapolation& extrapolation : kExtrapolations) names.emplace_back(extrapolation.name);
    return names;
  });
  module.def("noise", &noise, py::arg("kind"), py::arg("seed"), py::arg("step"), py::arg("worker"),
             py::arg("first"), py::arg("count"), "The random numbers of the elements from `first` on.");
  module.def("f16_to_f32", &widened<F16>);
  module.def("f32_to_f16", &narrowed<F16>);
  module.def("bf16_to_f32", &widened<Bf16>);
  module.def("f32_to_bf16", &narrowed<Bf16>);
}

}  // namespace xc::bind
