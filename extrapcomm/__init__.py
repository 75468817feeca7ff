"""Data-parallel optimizer steps as one collective.

Every rank brings its gradient; every rank leaves with its next weights. Reduction, update, extrapolation and
publication happen in a single pass over shared memory. Importing this package initialises nothing: MPI starts with
the first `World`, and torch is loaded when an optimizer is asked for.
"""

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .collectives import ArenaArray, all_gather, all_reduce, arena_array, broadcast, reduce_scatter
from .engine import Engine
from .errors import CommError, DeviceError, Error, MismatchError, PeerError, UsageError
from .world import World

if TYPE_CHECKING:
    from .amp import GradScaler
    from .optim import LAMB, LANS, LARS, SGD, Adam, AdamW, ExtrapAdam, ExtrapSGD

__all__ = [
    "LAMB",
    "LANS",
    "LARS",
    "SGD",
    "Adam",
    "AdamW",
    "ArenaArray",
    "CommError",
    "DeviceError",
    "Engine",
    "Error",
    "ExtrapAdam",
    "ExtrapSGD",
    "GradScaler",
    "MismatchError",
    "PeerError",
    "UsageError",
    "World",
    "__version__",
    "all_gather",
    "all_reduce",
    "arena_array",
    "broadcast",
    "reduce_scatter",
]

_OPTIMIZERS = ("SGD", "ExtrapSGD", "Adam", "AdamW", "ExtrapAdam", "LARS", "LAMB", "LANS")


def __getattr__(name: str) -> Any:
    """Load torch only for those who use its optimizers."""
    if name == "GradScaler":
        from . import amp

        return amp.GradScaler
    if name in _OPTIMIZERS:
        from . import optim

        return getattr(optim, name)
    raise AttributeError(f"module 'extrapcomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
