"""The module that carries bytes between hosts: one for each MPI, and it must be mpi4py's."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _core
from .errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["WireOptions", "built_wires", "wire_over"]

_FAMILIES = {"Open MPI": "openmpi", "MPICH": "mpich"}
_LARGEST = 1 << 30  # bytes of one message; MPI counts them in 31 bits


@dataclass(frozen=True)
class WireOptions:
    """How partial sums and new weights travel between teams; alike on all ranks.

    Args:
        dtype: of partial sums on the wire. "bfloat16" halves the bytes of that way and rounds each team's sum, so the
            result depends on how workers are spread over teams. New weights always travel in the master type, and
            float64 stays as it is.
        chunk: elements of each worker's segment that travel together, rounded up to 1024; by default what suits MPI's
            short messages and the number of teams.
        window: how many chunks may be under way before the first of them must have arrived.
        way: "direct" sends every partial sum to its owner at once: 2 (M - 1) messages per rank and chunk with M teams.
            "halving" goes by halves in 2 log2 M messages, one after the other, where M is a power of two and teams
            are equal (otherwise it is "direct"). "auto" takes what should need less time, by the next three.
            Both keep the order of summation.
        latency: seconds that a short message travels.
        overhead: seconds that a rank needs to begin one.
        bandwidth: bytes per second of one rank. `python -m extrapcomm tune` measures all three.
        order: of additions over teams. "tree" has the bits of the CPU. "nccl", for parameters on GPUs, leaves sums in
            float32 to NCCL's reduce-scatter, and new weights to its all-gather: results are as reproducible as NCCL's
            own, which depend on its version, the ranks, sizes and network. It takes NCCL between the ranks and teams
            of one size (`Engine` raises UsageError otherwise). Plain collectives keep the tree.

    With one team nothing travels, and these options have no effect.

    Raises:
        UsageError: for values that cannot be.
    """

    dtype: str = "float32"
    chunk: int | None = None
    window: int = 8
    way: str = "auto"
    latency: float = 20e-6
    overhead: float = 1e-6
    bandwidth: float = 1e9
    order: str = "tree"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"the wire's dtype must be 'float32' or 'bfloat16', not {self.dtype!r}")
        if self.chunk is not None and not (_is_whole(self.chunk) and self.chunk > 0):
            raise UsageError(f"the wire's chunk must be a number of elements, not {self.chunk!r}")
        if not (_is_whole(self.window) and 0 < self.window <= 1024):
            raise UsageError(f"the wire's window must be 1 to 1024 chunks, not {self.window!r}")

        if self.way not in ("auto", "direct", "halving"):
            raise UsageError(f"the wire's way must be 'auto', 'direct' or 'halving', not {self.way!r}")
        if self.order not in ("tree", "nccl"):
            raise UsageError(f"the wire's order must be 'tree' or 'nccl', not {self.order!r}")
        for name in ("latency", "overhead", "bandwidth"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise UsageError(f"the wire's {name} must be a positive number, not {value!r}")

    @classmethod
    def load(cls, path: str | Path) -> "WireOptions":
        """The options that `python -m extrapcomm tune` has written.

        Raises:
            UsageError: if the file is not there or holds something else.
        """
        try:
            values = json.loads(Path(path).read_text())["wire"]
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} does not hold the wire's options: {error}; make it with `mpirun ... python -m extrapcomm "
                f"tune -o {path}`"
            ) from error

    def for_core(self) -> tuple[int, int, bool, str, float, float, float, str]:
        """As the engine takes it."""
        costs = (float(self.latency), float(self.overhead), float(self.bandwidth))
        return self.chunk or 0, self.window, self.dtype == "bfloat16", self.way, *costs, self.order


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def built_wires() -> list[str]:
    """The MPIs for which this installation has a wire."""
    return sorted(
        path.name.split(".")[0].removeprefix("_mpi_") for path in Path(__file__).parent.glob("_mpi_*.so")
    )


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
