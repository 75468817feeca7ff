"""The module that carries bytes between hosts: one for each MPI, and it must be mpi4py's."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _core
from .errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["built_wires", "wire_over"]

_FAMILIES = {"Open MPI": "openmpi", "MPICH": "mpich"}
_LARGEST = 1 << 30  # bytes of one message; MPI counts them in 31 bits


def built_wires() -> list[str]:
    """The MPIs for which this installation has a wire."""
    return sorted(path.name.split(".")[0].removeprefix("_mpi_") for path in Path(__file__).parent.glob("_mpi_*.so"))


def wire_over(comm: "MPI.Intracomm") -> _core.Wire:
    """The wire over a communicator that nothing else uses.

    Raises:
        UsageError: if none was built for the MPI that mpi4py has loaded.
    """
    from mpi4py import MPI

    wire: _core.Wire = _module().wire(MPI._addressof(comm), _LARGEST)
    return wire


def _module() -> Any:
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    loaded = f"{vendor} {'.'.join(map(str, version))}"
    remedy = (
        "ranks on several hosts need it. With that MPI's mpicxx on PATH: pip install --no-build-isolation "
        "--force-reinstall --no-deps extrapcomm (from a source tree: make build)"
    )
    family = _FAMILIES.get(vendor, vendor.lower().replace(" ", ""))
    if family not in built_wires():
        others = ", ".join(built_wires()) or "none"
        raise UsageError(
            f"mpi4py has loaded {loaded}, but extrapcomm was built without a wire for it (there is: {others}); {remedy}"
        )
    module = import_module(f"._mpi_{family}", __package__)
    if module.handle_size != MPI._sizeof(MPI.Comm):
        raise UsageError(
            f"mpi4py has loaded {loaded}, but the wire was built for {module.compiled_for}, whose handles have another "
            f"size; {remedy}"
        )
    return module
