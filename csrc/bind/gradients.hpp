#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "bind/dlpack.hpp"
#include "engine/engine.hpp"

namespace xc::bind {

namespace py = pybind11;

// One row per layer: the address of its gradient and the number of bytes, as Engine::Source.
using Sources = py::array_t<std::int64_t, py::array::c_style>;
std::vector<Engine::Source> sources_from(const Sources& sources, const Plan& plan);

// Reads `.grad` of all parameters in one pass, through DLPack's table, without a Python call or a new object
// for each property.
//
// A gradient is PLAIN if its bytes can be copied as they are: it is a torch tensor of no other class, has the
// parameter's device, type, shape and strides, is not lazily negated, and its memory exists. It is ODD
// otherwise, and also if it lies in this rank's gradient memory, but not in its own place: a copy in another
// order than that of layers could overwrite it before it is read.
class GradientReader {
 public:
  // `tensor_types`: the classes whose tensors are what their memory says, torch.Tensor first. Returns nothing
  // if it offers no table, or one of another major version.
  static std::optional<GradientReader> make(const Engine& engine, const py::tuple& tensor_types);

  // Fills a row of `sources` for each parameter; rows of odd gradients are left as they are. `shown` has for
  // each parameter the tensor that Python's users may know as worker v's gradient memory. Returns the
  // gradients, None included; the indices of the odd ones; and those of shown tensors that somebody else
  // holds although another tensor is the gradient, whose memory is written next.
  py::tuple read(int v, const py::list& params, const py::list& shown, Sources& sources) const;

  // Indices of those of the tensors, one per parameter, that are not worker v's gradient memory as it is laid
  // out.
  py::list strays(int v, const py::list& tensors) const;

  // Returns true if every parameter has its layer's type, shape and strides, lies where worker v's weights
  // are, and has had so many writes more than `versions` says. False may also mean that a tensor cannot be
  // read.
  bool unchanged(int v, const py::list& params, const py::list& versions, std::int64_t writes) const;

 private:
  GradientReader(const Engine& engine, const dlpack::ExchangeTable& table, py::tuple types)
      : engine_(&engine),
        table_(&table),
        types_(std::move(types)),
        is_neg_(types_[0].attr("is_neg")),
        storage_offset_(types_[0].attr("storage_offset")),
        grad_(interned("grad")),
        version_(interned("_version")) {}

  // Python finds the attributes of interned names in its cache.
  static py::str interned(const char* name) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
  }

  struct Memory {
    const std::byte* begin;
    const std::byte* end;
  };
  Memory gradient_memory() const;
  std::optional<Engine::Source> plain(const Layer& layer, py::handle grad, const std::byte* place,
                                      const Memory& memory) const;
  bool has_plain_class(py::handle grad) const;
  bool is_released(const std::byte* address, py::handle grad) const;
  bool is_negated(py::handle grad) const;

  const Engine* engine_;
  const dlpack::ExchangeTable* table_;
  py::tuple types_;
  py::object is_neg_;
  py::object storage_offset_;
  py::str grad_;
  py::str version_;
};

}  // namespace xc::bind
