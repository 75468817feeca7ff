"""Data-parallel optimizer steps as one collective.

Every rank brings its gradient; every rank leaves with its next weights. Reduction, update, extrapolation and
publication happen in a single pass over shared memory. Importing this package initialises nothing: MPI starts with
the first `World`, and torch is loaded when an optimizer is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .adascale import AdaScale
from .collectives import ArenaArray, all_gather, all_reduce, arena_array, broadcast, reduce_scatter
from .engine import Engine
from .errors import CommError, DeviceError, Error, MismatchError, PeerError, UsageError
from .wire import WireOptions
from .world import World

if TYPE_CHECKING:
    from .amp import GradScaler
    from .eg import EG
    from .optim import CLARS, LAMB, LANS, LARS, SGD, Adam, AdamW, ExtrapAdam, ExtrapSGD
    from .post_local import PostLocalSGD
    from .projected import SGDP, AdamP
    from .variance_reduced import VRLAMB, VRLARS, VRSGD, VRAdam

__all__ = [
    "CLARS",
    "EG",
    "LAMB",
    "LANS",
    "LARS",
    "SGD",
    "AdaScale",
    "SGDP",
    "Adam",
    "AdamP",
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
    "PostLocalSGD",
    "UsageError",
    "VRAdam",
    "VRLAMB",
    "VRLARS",
    "VRSGD",
    "WireOptions",
    "World",
    "__version__",
    "all_gather",
    "all_reduce",
    "arena_array",
    "broadcast",
    "reduce_scatter",
]

# Where the names are that need torch, which is loaded only for those who use them.
_LAZY = {
    "amp": ("GradScaler",),
    "eg": ("EG",),
    "optim": ("SGD", "ExtrapSGD", "Adam", "AdamW", "ExtrapAdam", "LARS", "CLARS", "LAMB", "LANS"),
    "post_local": ("PostLocalSGD",),
    "projected": ("AdamP", "SGDP"),
    "variance_reduced": ("VRSGD", "VRAdam", "VRLARS", "VRLAMB"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module 'extrapcomm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
