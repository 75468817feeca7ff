"""Plain collectives on arrays in shared memory: the engine's stages without a rule."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from . import _core
from .arrays import look_at
from .errors import UsageError
from .world import World

__all__ = ["ArenaArray", "all_gather", "all_reduce", "arena_array", "broadcast", "reduce_scatter"]


class ArenaArray:
    """One array per worker of a world, all of one shape and type, that collectives work on in place.

    Made by `arena_array`.

    Attributes:
        views: this rank's arrays, one per worker, as NumPy arrays of `shape` (bfloat16 through ml_dtypes if that is
            loaded, else as uint16).
        shape: the shape of each.
    """

    def __init__(self, world: World, shape: tuple[int, ...], dtype: str, owns_world: bool) -> None:
        self.world = world
        self._owns_world = owns_world
        self.shape = shape
        self._core = _core.SharedArray(world.team, dtype, math.prod(shape))
        self.views = [look_at(self._core.view(v), "numpy").reshape(shape) for v in range(world.workers)]

    @property
    def view(self) -> Any:
        """The array of this rank's first worker."""
        return self.views[0]

    def block(self, worker: int) -> slice:
        """The part of the flattened array that belongs to a worker, 0 <= worker < K.

        Blocks follow one another in the order of workers; they are equal if K divides the number of elements.
        """
        if not 0 <= worker < self.world.K:
            raise UsageError(f"there is no worker {worker}; the world has {self.world.K}")
        return slice(*self._core.block(worker))

    def close(self) -> None:
        """End this rank's part; other ranks' collectives on it raise PeerError. The views stay readable."""
        self._core.close()
        if self._owns_world:
            self.world.close()


def arena_array(
    shape: int | Sequence[int], dtype: DTypeLike = "float32", world: World | None = None
) -> ArenaArray:
    """Collective: make an array of zeros for every worker of the world, in shared memory.

    Args:
        shape: of each worker's array.
        dtype: float32, float64, float16 or bfloat16 (by name).
        world: the ranks that take part; a new World by default.

    Raises:
        UsageError: for other element types.
        MismatchError: on every rank, if the ranks ask for different shapes or types.

    Example:
        >>> import extrapcomm as xc
        >>> with xc.World(workers=2) as world:
        ...     a = xc.arena_array(3, world=world)
        ...     for v in range(2):
        ...         a.views[v][:] = v + 1
        ...     xc.all_reduce(a, "mean")
        ...     print(a.view)
        [1.5 1.5 1.5]
    """
    owns_world = world is None
    world = World() if world is None else world
    error: Exception | None = None
    try:
        name = dtype if isinstance(dtype, str) and dtype in _core.dtypes() else np.dtype(dtype).name
        lengths = (
            (operator.index(shape),) if not isinstance(shape, Sequence) else tuple(map(operator.index, shape))
        )
        if name not in _core.dtypes() or any(length < 0 for length in lengths):
            raise UsageError(f"no array of {name} and shape {lengths}; types are {', '.join(_core.dtypes())}")
    except Exception as caught:
        error = caught
    world.agree(error, "" if error else f"{name} array of shape {lengths}")
    return ArenaArray(world, lengths, name, owns_world)


def all_reduce(array: ArenaArray, op: str = "sum") -> None:
    """Collective: every worker's array becomes the sum, or mean, over all workers.

    Sums follow one fixed tree over the workers, in float32 (float64 for float64), so the bits do not depend on how
    workers are spread over ranks.

    Args:
        array: made by `arena_array`.
        op: "sum" or "mean".

    Raises:
        UsageError: for another op; on every rank.
        MismatchError: if ranks are in different collective calls; on every rank, nothing changed.
        PeerError: if a rank died or does not come.
    """
    _require_array(array)
    array._core.all_reduce(_reduction(array, op, _core.Operation.all_reduce))


def reduce_scatter(array: ArenaArray, op: str = "sum") -> None:
    """Collective: every worker's own block becomes the sum, or mean, of that block over all workers.

    The rest of each array stays as it is. Arguments and errors are those of `all_reduce`.
    """
    _require_array(array)
    array._core.reduce_scatter(_reduction(array, op, _core.Operation.reduce_scatter))


def all_gather(array: ArenaArray) -> None:
    """Collective: every block of every array becomes what the block's owner has there.

    Errors are those of `all_reduce`.
    """
    _require_array(array)
    array._core.all_gather()


def broadcast(array: ArenaArray, root: int = 0) -> None:
    """Collective: every worker's array becomes that of worker `root`.

    Errors are those of `all_reduce`; a root that is no worker is a UsageError on every rank.
    """
    _require_array(array)
    if not (isinstance(root, int) and 0 <= root < array.world.K):
        array._core.complain(
            _core.Operation.broadcast, f"root {root!r} is not one of the {array.world.K} workers"
        )
    array._core.broadcast(root)


def _require_array(array: Any) -> None:
    if not isinstance(array, ArenaArray):
        raise UsageError(f"collectives work on arrays made by arena_array(), not on {type(array).__name__}")


def _reduction(array: ArenaArray, op: str, operation: _core.Operation) -> _core.Reduction:
    if op not in ("sum", "mean"):
        array._core.complain(operation, f"op must be 'sum' or 'mean', not {op!r}")
    return _core.Reduction.mean if op == "mean" else _core.Reduction.sum
