"""What all torch optimizers here share: weights in shared memory, and a step that is the engine's."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, overload

import torch

from . import _core, checkpoint, hooks
from ._version import __version__
from .arrays import form_of
from .binding import MANNERS, Binding, bump_versions
from .checkpoint import Checkpoints
from .errors import UsageError, describe
from .hyper import InnerRate, Rule, check_max_norm, check_tile
from .world import World, log

__all__ = ["FusedOptimizer", "Params"]

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class FusedOptimizer(Checkpoints):
    """A torch optimizer on an engine.

    At construction the parameters get rank 0's values and move into shared memory, one piece of it for each worker;
    the model keeps its tensors. Between steps each worker's weights are displaced if there is an extrapolation; the
    master weights, the same for all, are seen within `master_weights()`. The engine computes the weights from the
    master weights, so what others write into a parameter would be lost at the next step: that is an error, unless
    `adopt()` is called.

    Attributes:
        world: the ranks and workers that train together.
        max_grad_norm: the mean gradient is scaled down to this norm if it is longer; None: never. May change between
            steps, alike on all ranks.
        skip_nonfinite: whether a step whose mean gradient is not finite changes nothing on any rank.
        grad_norm: the norm of the last step's mean gradient before clipping, alike on all ranks; None unless
            `max_grad_norm` or `skip_nonfinite` asks for it.
        skipped: whether the last step was skipped.
    """

    RULE = ""
    found_inf: torch.Tensor
    grad_scale: torch.Tensor | None
    # torch's GradScaler then leaves the decision to skip to step(), which refuses it: see xc.GradScaler.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        extrapolation: str = "none",
        inner_lr: InnerRate = "lr/K",
        world: World | None = None,
        tile: int = 512,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        accumulation: str = "mean",
        gradients: str = "copy",
        choices: Sequence[tuple[str, Any, tuple[str, ...]]] = (),
    ) -> None:
        if not (world is None or isinstance(world, World)):
            raise UsageError(f"world must be a World, not {world!r}")
        self._owns_world = world is None
        self.world = World() if world is None else world
        self._built = self._closed = self._showing = self._to_adopt = False
        self._warned: set[str] = set()
        self._tile = tile
        self._accumulation = accumulation
        self._manner = gradients
        self._open_micro_batches = False
        self._visited: set[int] = set()  # workers bound in no_sync()
        self._loss_scale = 1.0
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.grad_norm: float | None = None
        self.skipped = False
        error: Exception | None = None
        try:
            self._rule = Rule(self.RULE, extrapolation)
            super().__init__(params, defaults | {"inner_lr": inner_lr})
            layers, groups = self._describe()
            check_tile(tile)
            check_max_norm(max_grad_norm)
            own = (("accumulation", accumulation, ("mean", "sum")), ("gradients", gradients, MANNERS))
            for name, value, allowed in (*choices, *own):
                _check_choice(name, value, allowed)
        except Exception as caught:
            error = caught
        self.world.agree(error, type(self).__name__)
        self._bind(self._make_core(layers, groups), layers, groups)

    def _make_core(self, layers: list[Any], groups: list[Any]) -> "_core.Engine":
        """Collective: an engine for these groups."""
        options = (self.RULE, self._rule.extrapolation, self._tile, __version__)
        return _core.Engine(self.world.team, layers, groups, *options)

    def _bind(self, core: "_core.Engine", layers: list[Any], groups: list[Any]) -> None:
        """Collective: rank 0's weights into this engine, and the model into its memory."""
        self._core = core
        self._built = True
        self._settled = [
            (flags, bool(group.get("momentum")))
            for (flags, _), group in zip(groups, self.param_groups, strict=True)
        ]
        params = [p for group in self.param_groups for p in group["params"]]
        names = [name for name, *_ in layers]
        self._binding = Binding(core, params, names, self.world.workers, self._manner)
        self._micro_batches = [0] * self.world.workers
        self._binding.copy_initial()
        self._core.adopt(0)
        self._binding.show(0)

    # -- The step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Collective: the mean of all workers' gradients, the update, and every worker's next weights.

        A parameter whose gradient is None on all workers is left alone; None on some counts as zeros there.

        Args:
            closure: called first, with gradients enabled, to evaluate the model and return the loss.

        Returns:
            What the closure returned.

        Raises:
            UsageError, MismatchError: on every rank, with no weight touched.
            PeerError: if a rank died, left or does not come; the optimizer takes no more steps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_open()
        if self._to_adopt:
            self.adopt()
        try:
            table = self._checked_table()
            self._binding.collect()
            divisor = self._divisor()
            skip = bool(self.skip_nonfinite)
        except Exception as error:
            self._core.complain(describe(error))
            raise
        self._warn_of_mistakes()
        max_norm = self.max_grad_norm or 0.0
        self.grad_norm, self.skipped = self._core.step(
            table, self._binding.present, True, divisor, max_norm, skip
        )
        self._micro_batches = [0] * self.world.workers
        if not self.skipped:
            self._binding.mark_written()
        return loss

    def scaled_step(self, scale: float, *args: Any, **kwargs: Any) -> Any:
        """Collective: `step` on gradients of a loss that was multiplied by `scale`; skipped if they overflowed."""
        before = self.skip_nonfinite
        self._loss_scale, self.skip_nonfinite = scale, True
        try:
            return self.step(*args, **kwargs)
        finally:
            self._loss_scale, self.skip_nonfinite = 1.0, before

    def _checked_table(self) -> Any:
        if self._showing:
            raise UsageError("step() inside master_weights(): leave the context first")
        if self._open_micro_batches:
            raise UsageError("step() inside no_sync(): the last micro-batch belongs outside")
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale
            raise UsageError(
                "torch's GradScaler sees this rank's gradients only, so the ranks' scales would part: use xc.GradScaler"
            )
        check_max_norm(self.max_grad_norm)
        if not self._to_adopt:
            self._binding.require_own_weights()
        for group, (flags, slots) in zip(self.param_groups, self._settled, strict=True):
            self._rule.check_fixed(group, flags, slots)
        return self._rule.table(self.param_groups, self.world.K)

    def _divisor(self) -> float:
        """What every gradient is divided by, beside the number of workers."""
        extra = set(self._micro_batches)
        if len(extra) > 1:
            raise UsageError(
                f"this rank's workers have accumulated {[n + 1 for n in self._micro_batches]} micro-batches; "
                "all need the same number"
            )
        micro_batches = 1 + extra.pop() if self._accumulation == "mean" else 1
        divisor = micro_batches * self._loss_scale
        if not 0 < divisor < math.inf:
            raise UsageError(f"the loss scale must be a positive number, not {self._loss_scale}")
        return divisor

    def _warn_of_mistakes(self) -> None:
        """What is probably not meant, each once."""
        if self.world.K > 1 and self._binding.was_rescaled():
            self._warn_once(
                "this rank's gradients were changed between backward() and step(). Clipping them there "
                "(clip_grad_norm_) uses another norm on each rank: set max_grad_norm instead, which clips the mean"
            )
        self._binding.forget_rescaling()
        if self.world.workers == 1:
            return
        idle = ~self._binding.present.any(axis=1)
        if idle.any() and not idle.all():
            self._warn_once(
                f"{idle.sum()} of this rank's {self.world.workers} workers have no gradient at all and count as zeros "
                "in the mean: run forward and backward once in `with opt.worker(v)` for every v"
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning(text)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients of all workers of this rank, and what has been accumulated.

        Args:
            set_to_none: drop them, the default unless the optimizer was made with gradients="view"; otherwise existing
                ones become zeros in shared memory, and the next backward pass adds to them there.
        """
        self._binding.require_own_process()
        self._micro_batches = [0] * self.world.workers
        self._binding.forget_rescaling()
        if set_to_none or (set_to_none is None and self._manner != "view"):
            self._binding.forget_gradients()
        else:
            self._binding.zero_gradients()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within the context backward() brings one more micro-batch: use it for all but the last before a step.

        The next step divides by their number, or not with accumulation="sum". It costs no pass over memory.

        Example:
            >>> import torch, extrapcomm as xc
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = xc.SGD(model.parameters(), lr=0.1)
            >>> with opt.no_sync():
            ...     model(torch.ones(1, 2)).sum().backward()
            >>> model(torch.zeros(1, 2)).sum().backward()
            >>> opt.step()
            >>> opt.close()
        """
        if self._open_micro_batches:
            raise UsageError("no_sync() is already open: leave it after each micro-batch")
        self._require_open()
        self._visited.clear()
        self._open_micro_batches = True
        try:
            yield
        finally:
            self._open_micro_batches = False
        for v in self._visited or {self._binding.bound}:
            self._micro_batches[v] += 1

    @property
    def last_step_seconds(self) -> float:
        """How long the last step took inside the compiled part, in seconds, waiting included."""
        return self._core.last_step_seconds

    # -- Workers -------------------------------------------------------------------------------------------------

    @contextmanager
    def worker(self, v: int) -> Iterator[None]:
        """Within the context the model has the weights and gradients of this rank's worker v.

        Args:
            v: 0 <= v < world.workers.

        Raises:
            UsageError: for another v.
        """
        if not (isinstance(v, int) and 0 <= v < self.world.workers):
            raise UsageError(f"there is no worker {v!r}; this rank drives {self.world.workers}, from 0")
        before = self._binding.bound
        self._switch(v)
        try:
            yield
        finally:
            self._switch_back(before)

    def _switch_back(self, v: int) -> None:
        visited = set(self._visited)
        self._switch(v)
        self._visited = visited

    def _switch(self, v: int) -> None:
        if self._showing:
            raise UsageError("worker() inside master_weights(): leave the context first")
        self._binding.require_own_process()
        if self._open_micro_batches:
            self._visited.add(v)
        if v != self._binding.bound:
            if not self._to_adopt:
                self._binding.require_own_weights()
            self._binding.switch(v)
            if self._to_adopt:
                self._binding.copy_shown_to(v)
                self._binding.record()

    # -- Who writes the weights ----------------------------------------------------------------------------------

    def _begin_loading(self) -> None:
        """The model gets the master weights, if nobody else wrote into it; what is loaded then goes over them."""
        if self._binding.bound != 0:
            raise UsageError(
                "load_state_dict() inside worker(): leave the context first; rank 0's first worker loads"
            )
        if not self._to_adopt and self._binding.is_own():
            self._core.show_master(0)
            self._core.keep_master(0)
            self._binding.mark_written()

    def adopt(self) -> None:
        """Collective: take rank 0's present weights as the master weights of all, undisplaced; keep the rule's state.

        Raises:
            UsageError: on every rank, if one is inside `worker()` or `master_weights()`, or if a parameter was
                replaced by one of another shape or type.
        """
        self._require_open()
        try:
            if self._showing or self._binding.bound != 0:
                raise UsageError("adopt() inside master_weights() or worker(): leave the context first")
            self._binding.take_over()
        except Exception as error:
            self._core.complain(describe(error))
            raise
        self._adopt()

    def _adopt(self) -> None:
        self._core.adopt(0)
        self._to_adopt = False
        self._binding.mark_written()
        self._binding.record()

    def attach(self, model: torch.nn.Module) -> None:
        """Let the model save and load the master weights.

        Afterwards `model.state_dict()` gives the master weights, whatever the worker's displacement, so the usual
        `torch.save(model.state_dict(), ...)` on rank 0 saves the right model; and after `model.load_state_dict()`,
        which every rank must call, the next step adopts what was loaded.

        Args:
            model: any module that contains parameters of this optimizer.

        Raises:
            UsageError: if it contains none.
        """
        hooks.attach(self, model)

    def master(self, i: int) -> torch.Tensor:
        """A copy of the i-th parameter's master weights, float32 (float64 for float64). Not collective."""
        return checkpoint.strided(self._core.read(i, 0), self._binding.params[i])

    @contextmanager
    def master_weights(self, write: bool = False) -> Iterator[None]:
        """Within the context the model holds the master weights, the same on all ranks: evaluate and save here.

        Afterwards it holds what it held before, bit for bit. Not collective: one rank may evaluate while the others
        wait at the next step.

        Args:
            write: collective then: on leaving, rank 0's weights become the master weights of all.
        """
        self._require_open()
        if self._showing:
            raise UsageError("master_weights() is already open")
        if self._to_adopt and write:
            self.adopt()
        if self._to_adopt:  # the model holds what the next step adopts
            with self._binding.kept():
                self._showing = True
                try:
                    yield
                finally:
                    self._showing = False
            return
        self._core.show_master(self._binding.bound)
        self._showing = True
        self._binding.mark_written()
        try:
            yield
        except BaseException as error:
            self._hide_master()
            if write and not self._closed:
                self._core.complain(f"master_weights(write=True) was left by {type(error).__name__}: {error}")
            raise
        if write and not self._closed:
            self._core.keep_master(self._binding.bound)
            self._showing = False
            self._adopt()
        else:
            self._hide_master()

    def _hide_master(self) -> None:
        if not self._showing:
            return  # closed meanwhile
        self._showing = False
        self._core.hide_master(self._binding.bound)
        self._binding.mark_written()

    def sync_buffers(self, model: torch.nn.Module, how: str = "broadcast") -> None:
        """Collective: make the model's buffers (BatchNorm's running statistics) alike on all ranks.

        Args:
            model: whose buffers.
            how: "broadcast" takes rank 0's; "average" takes the mean of floating-point ones, rank 0's of the others.

        Raises:
            UsageError: for another `how`.
        """
        hooks.sync_buffers(self.world, model, how)

    # -- What torch expects of an optimizer ----------------------------------------------------------------------

    def close(self) -> None:
        """Leave the master weights in the model and end this rank's part. Idempotent, not collective.

        Weights that were loaded or written and not adopted yet stay as they are.
        """
        if self._closed:
            return
        if self._showing:
            self._hide_master()
        if self._binding.bound != 0:
            self._binding.show(0)
        self._binding.remove_hooks()
        self._closed = True
        with self._binding.kept() if self._to_adopt else nullcontext():
            self._core.close()
        bump_versions(self._binding.params)
        if self._owns_world:
            self.world.close()

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._closed

    @property
    def adoption_pending(self) -> bool:
        """Whether the model has loaded weights that the next step adopts; it holds them already."""
        return self._to_adopt

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this optimizer is closed")
        self._binding.require_own_process()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("an extrapcomm optimizer cannot be copied or pickled; make one in each rank")

    def __getstate__(self) -> Any:
        self.__reduce_ex__(0)

    def _describe(self) -> tuple[list[Any], list[Any]]:
        """The engine's layers and groups."""
        layers, groups, seen = [], [], set()
        for g, group in enumerate(self.param_groups):
            if switches := [s for s in checkpoint.FOREIGN_SWITCHES if group.get(s)]:
                raise UsageError(f"extrapcomm's optimizers do not have {', '.join(switches)}")
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                if id(param) in seen:
                    raise UsageError(f"parameter {name!r} is given twice")
                seen.add(id(param))
                form = form_of(param, f"parameter {name!r}")
                layers.append((name, form.dtype, form.shape, form.strides, g))
            numbers = self._rule.numbers(group, self.world.K)[:-1]
            groups.append((self._rule.flag_bits(group), numbers))
        return layers, groups


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
