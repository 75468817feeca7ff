#include "bind/register.hpp"
#include "core/error.hpp"

namespace xc::bind {
namespace {

// The classes live in extrapcomm.errors, where Python users find them; here they are only raised.
void set(const char* name, const char* text) {
  PyErr_SetString(py::module_::import("extrapcomm.errors").attr(name).ptr(), text);
}

void set_peer_error(const PeerError& error) {
  const py::object type = py::module_::import("extrapcomm.errors").attr("PeerError");
  const py::object value = type(error.what(), error.rank, error.step, error.kind, error.reason);
  PyErr_SetObject(type.ptr(), value.ptr());
}

}  // namespace

void register_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const PeerError& error) {
      set_peer_error(error);
    } catch (const UsageError& error) {
      set("UsageError", error.what());
    } catch (const MismatchError& error) {
      set("MismatchError", error.what());
    } catch (const CommError& error) {
      set("CommError", error.what());
    } catch (const DeviceError& error) {
      set("DeviceError", error.what());
    }
  });
}

}  // namespace xc::bind
