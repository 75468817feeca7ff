"""The fused step for trainers that hold their weights in arrays."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from . import _core
from ._version import __version__
from .adascale import AdaScale
from .arrays import copy_into, form_of, look_at, require_visible
from .device import core_on, device_for, title_on, warn_of_shared_gpu
from .errors import UsageError, describe
from .gain import Gain, Gained, Gathered
from .hyper import Extrapolation, InnerRate, Rule, check_max_norm, check_tile
from .observed import ObservedCore
from .world import World

__all__ = ["Engine"]


@dataclass(frozen=True)
class Worker:
    """One worker's arrays in shared memory, in the structure that the engine was given, which is read-only.

    Write into the arrays (`grads["w"][:] = ...`), not into the structure.

    Attributes:
        weights: where this worker evaluates its next gradient; written by the engine only.
        grads: where this worker leaves its gradient before a step.
    """

    weights: Any
    grads: Any


RATE = {"lr"}  # what may change without anything else to check


class Engine(Gained):
    """Data-parallel training of arrays: reduce, update, extrapolate and publish in one call.

    Collective: every rank of the world constructs it with arrays of the same names, shapes and types. The values of
    rank 0 are taken.

    Args:
        world: the ranks and workers that train together.
        weights: one array, a sequence of arrays, or a dict of them (NumPy, torch or DLPack), float32, float64,
            bfloat16 or float16. They are copied; train on `engine.weights`.
        rule: "sgd", "adam", "lars", ...: any of docs/algorithms.md.
        extrapolation: "none", "local" (EXTRAP-SGD: each worker's own last gradient), "global" (the last mean),
            "anisotropic" (own less mean), or random: "gaussian", "uniform", "filter".
        inner_lr: the inner learning rate: a number, "lr", "lr/K", "noise", or a function of lr.
        displacement, inner_clip, noise, seed: see `SGD`.
        tile: how many elements go through all stages before the next ones; by default the first steps of 4 MiB or
            more try several lengths, where they walk tiles at all. No bit depends on it. `XC_TILE` overrides it.
        max_grad_norm: scale the mean gradient down to this norm if it is longer, and each worker's displacement by
            the same factor; the step then takes a second pass over memory.
        skip_nonfinite: let a step whose mean gradient is not finite change nothing on any rank; likewise.
        gain: an `AdaScale` of this engine's own: each step's learning rate is multiplied by its gain, before the
            inner rate follows from it. It takes two workers or more; how many micro-batches `divisor` stands for is
            not known here, so by default the scale is K.
        streaming: publish the weights past the cache or not; by default the first 24 steps of 4 MiB or more try both
            ways, and the faster stays.
        hyper: the rule's hyper-parameters under torch's names (lr, momentum, nesterov, betas, ...), and `maximize`,
            which takes the negative of every worker's gradient wherever one is read. Flags cannot change later.

    Attributes:
        max_grad_norm, skip_nonfinite: as given; may change between steps, alike on all ranks.

    Raises:
        UsageError: on every rank, for arguments that cannot be.
        MismatchError: on every rank, if the ranks bring different arrays or options; it names the first difference.

    Example:
        >>> import numpy as np, extrapcomm as xc
        >>> with xc.World(workers=2) as world:
        ...     engine = xc.Engine(world, np.ones(3), lr=0.5)
        ...     for v, worker in enumerate(engine.workers):
        ...         worker.grads[:] = v
        ...     engine.step()
        ...     print(engine.weights)
        [0.75 0.75 0.75]
    """

    def __init__(
        self,
        world: World,
        weights: Any,
        rule: str = "sgd",
        *,
        extrapolation: str = "none",
        inner_lr: InnerRate = "lr/K",
        displacement: str = "preconditioned",
        inner_clip: bool = True,
        noise: float = 1.0,
        seed: int = 0,
        tile: int | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        gain: AdaScale | None = None,
        streaming: bool | None = None,
        **hyper: Any,
    ) -> None:
        if not isinstance(world, World):
            raise UsageError(f"world must be a World, not {world!r}")
        self.world = world
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._captured_divisor: float | None = None
        device: _core.Device | None = None
        error: Exception | None = None
        try:
            kind = Extrapolation(extrapolation, displacement, inner_clip, noise, seed)
            self._rule = Rule(rule, kind, world.K)
            self._names, arrays = _flatten(weights)
            self._group = self._completed({"inner_lr": inner_lr, **hyper})
            forms = [form_of(a, f"array {n!r}") for n, a in zip(self._names, arrays, strict=True)]
            group = self._rule.for_core(self._group, world.K, 0)
            for form in forms:
                require_visible(form)
            self._forms = forms
            device = device_for([form.device for form in forms])
            self._check_filters(inner_lr)
            check_tile(tile)
            check_max_norm(max_grad_norm)
            self._gain = None if gain is None else Gain(gain, self._rule, world.K)
            self._gathered = Gathered(world.K)
            if self._gain is not None:
                self._gain.require(self._gathered, [self._group])
        except Exception as caught:
            error = caught
        world.agree(error, title_on("Engine" if gain is None else f"Engine with {gain}", device))
        warn_of_shared_gpu(world, device)
        self._rule.table([self._group], world.K)
        self._rule.took()
        self._flags = self._rule.flag_bits(self._group)
        self._has_momentum = self._rule.has_buffer(self._group)
        layers = [(n, f.dtype, f.shape, f.strides, 0) for n, f in zip(self._names, forms, strict=True)]
        options = (rule, kind.for_core(), tile, __version__, streaming)
        library = forms[0].library if forms else "numpy"
        core = _core.Engine(world.team, layers, [group], *options, device=device)
        self._core: _core.Engine = core_on(device, library, core)
        self._device = device
        self._structure = weights
        self._closed = False
        self._showing = False
        self._present = np.ones(world.workers * len(layers), dtype=np.uint8)
        looks = [f.library if f.library in ("torch", "cupy") else "numpy" for f in forms]
        self.workers = [
            Worker(self._arrays(self._core.weights, v, looks), self._arrays(self._core.gradients, v, looks))
            for v in range(world.workers)
        ]
        for i, array in enumerate(arrays):
            copy_into(self._core.weights(0, i), array)
        self._core.adopt(0)

    @property
    def weights(self) -> Any:
        """The weights of this rank's first worker, in the structure given."""
        return self.workers[0].weights

    @property
    def grads(self) -> Any:
        """The gradients of this rank's first worker, in the structure given."""
        return self.workers[0].grads

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._core.steps

    @property
    def way(self) -> str:
        """How sums travel between teams: "direct", "halving" or "nccl" (see `WireOptions`); "none" with one team."""
        return self._core.way

    @property
    def streaming(self) -> bool | None:
        """Whether this rank publishes weights past the cache; None while it tries both ways. No bit depends on it."""
        return self._core.streaming

    @property
    def tile(self) -> int | None:
        """The elements that go through all stages together on this rank; None while it tries several lengths, and where
        it need not because its steps have no tiles.
        """
        return self._core.tile

    @property
    def last_step_seconds(self) -> float:
        """How long the last step took inside the compiled part, in seconds, waiting included."""
        return self._core.last_step_seconds

    def step(self, *, divisor: float = 1.0, **hyper: Any) -> None:
        """Collective: take the mean of all workers' gradients, update, and give every worker its next weights.

        Gradients are left as they are.

        Args:
            divisor: every gradient counts for this part of itself: the number of micro-batches that were added up,
                or a loss scale.
            hyper: new values of hyper-parameters, in force from this step on.

        Raises:
            UsageError, MismatchError: on every rank, with no weight touched.
            PeerError: if a rank died, left or does not come; the engine takes no more steps.
        """
        self._step(hyper, divisor, fused=True)

    def step_unfused(self, **hyper: Any) -> None:
        """Collective: the same step with each stage in a pass of its own, to measure what fusion is worth."""
        self._step(hyper, 1.0, fused=False)

    def prepare_replay(self, **hyper: Any) -> None:
        """Before each replay of a captured step: give it these and the present hyper-parameters.

        See `extrapcomm.fused.FusedOptimizer.prepare_replay`; the divisor is the captured step's.

        Args:
            hyper: new values of hyper-parameters, in force from this step on.

        Raises:
            UsageError: if no step was captured, or the next one cannot be a replay of it.
        """
        if self._closed:
            raise UsageError("this engine is closed")
        if self._captured_divisor is None or self._core.captures:
            raise UsageError(
                "prepare_replay() comes before each replay of a step that was captured, outside of the capture"
            )
        group = self._next_group(hyper)
        table = self._rule.table([group], self.world.K)
        norm, skips = self.max_grad_norm or 0.0, bool(self.skip_nonfinite)
        self._core.prepare_replay(table, self._present, self._captured_divisor, norm, skips)
        self._rule.took()
        self._group = group

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's mean gradient before clipping, alike on all ranks; on a GPU, waits for it.

        None unless `max_grad_norm` or `skip_nonfinite` asks for it.
        """
        return self._core.outcome[0]

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped, on all ranks alike; on a GPU, waits for it."""
        return self._core.outcome[1]

    def _next_group(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """The hyper-parameters of a step, checked."""
        group = {**self._group, **hyper}
        if not hyper.keys() <= RATE:
            group = self._completed(group)
            self._rule.check_fixed(group, self._flags, self._has_momentum)
            self._check_filters(group["inner_lr"])
        if self._showing:
            raise UsageError("step() inside master_weights(): leave the context first")
        check_max_norm(self.max_grad_norm)
        return group

    def _step(self, hyper: Mapping[str, Any], divisor: float, fused: bool) -> None:
        if self._closed:
            raise UsageError("this engine is closed")
        try:
            group = self._next_group(hyper)
            if not (isinstance(divisor, (int, float)) and 0 < divisor < float("inf")):
                raise UsageError(f"divisor must be a positive number, not {divisor!r}")
            if not fused:
                self._require_unfusable()
            table = self._rule.table([group], self.world.K)
        except Exception as error:
            self._core.complain(describe(error))
            raise
        skip = bool(self.skip_nonfinite)
        options = (self._present, fused, float(divisor), self.max_grad_norm or 0.0, skip)
        observed = ObservedCore(self._core, self._rule, [group])
        if self._gain is None:
            observed.step(table, *options)
        else:
            self._gain.step(observed, table, [group], self._gathered, options)
        if self._core.captures:
            self._captured_divisor = float(divisor)
        self._rule.took()
        self._group = group

    def _check_filters(self, inner_lr: InnerRate) -> None:
        if not self._rule.has_filters:
            return
        for name, form in zip(self._names, self._forms, strict=True):
            self._rule.check_filters(name, form.shape, form.strides, inner_lr)

    def _require_unfusable(self) -> None:
        if self.max_grad_norm or self.skip_nonfinite or self._rule.measures or self._gain:
            raise UsageError(
                "step_unfused() has no max_grad_norm, no skip_nonfinite, no gain and no rule with trust ratios"
            )
        if self._rule.follows_noise([self._group]):
            raise UsageError("step_unfused() measures no noise for inner_lr='noise'")
        if not self._rule.has_stages_of_its_own:
            raise UsageError("step_unfused() has no preconditioned and no random displacement")

    def master(self) -> Any:
        """Copies of the master weights, float32 (float64 for float64), in the structure given. Not collective."""
        flat = [self._core.read(i, 0) for i in range(len(self._names))]
        views = [self._core.weights(0, i) for i in range(len(self._names))]
        return self._rebuild([_restride(f, v.shape, v.strides) for f, v in zip(flat, views, strict=True)])

    @contextmanager
    def master_weights(self) -> Iterator[None]:
        """Within the context `weights` hold the master weights; afterwards what they held before, bit for bit.

        Not collective: one rank may evaluate while others wait at the next step.
        """
        if self._showing or self._closed:
            raise UsageError("master_weights() is already open, or the engine is closed")
        self._core.show_master(0)
        self._showing = True
        try:
            yield
        finally:
            if self._showing:
                self._showing = False
                self._core.hide_master(0)

    def close(self) -> None:
        """Leave the master weights in `weights` and end this rank's part. Idempotent, not collective."""
        if not self._closed:
            self._closed = True
            self._showing = False
            self._core.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("an Engine cannot be copied or pickled; make one in each rank")

    def _completed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        presets = self._rule.presets() | {"inner_lr": "lr/K"}
        if unknown := values.keys() - presets.keys():
            raise UsageError(f"rule {self._rule.name!r} has no {sorted(unknown)}; it has {sorted(presets)}")
        return {**presets, **values}

    def _arrays(self, look: Any, worker: int, libraries: Sequence[str]) -> Any:
        return self._rebuild([look_at(look(worker, i), library) for i, library in enumerate(libraries)])

    def _rebuild(self, arrays: list[Any]) -> Any:
        if isinstance(self._structure, Mapping):
            return MappingProxyType(dict(zip(self._structure, arrays, strict=True)))
        return tuple(arrays) if isinstance(self._structure, (list, tuple)) else arrays[0]


def _flatten(weights: Any) -> tuple[list[str], list[Any]]:
    if isinstance(weights, Mapping):
        return [str(name) for name in weights], list(weights.values())
    if isinstance(weights, (list, tuple)):
        return [str(i) for i in range(len(weights))], list(weights)
    return ["weights"], [weights]


def _restride(flat: Any, shape: Sequence[int], strides: Sequence[int]) -> Any:
    return np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in strides])
