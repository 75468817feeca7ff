"""What all torch optimizers here share: weights in shared memory, and a step that is the engine's."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, overload

import torch

from .adascale import AdaScale
from .checkpoint import Checkpoints
from .construction import Agreed, refuse_unknown
from .device import device_for, title_on, warn_of_shared_gpu
from .errors import UsageError, describe
from .gain import Gain, Gained, Gathered
from .gradients import MANNERS
from .handed_out import HandedOut
from .hyper import Extrapolation, InnerRate, Rule, check_bucket, check_choice, check_max_norm, check_tile
from .micro_batches import MicroBatches
from .modes import keep_from_dynamo
from .observed import ObservedCore
from .order import AttachedModels, Fingerprint, require_same_order
from .replay import Captured
from .step_hooks import hooked_as_torchs, with_torchs_hooks
from .switches import refuse_switches
from .world import World, log

__all__ = ["FusedOptimizer", "Params"]

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class FusedOptimizer(Checkpoints, Gained, metaclass=Agreed):
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
    """

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
        displacement: str = "preconditioned",
        inner_clip: bool = True,
        noise: float = 1.0,
        seed: int = 0,
        world: World | None = None,
        tile: int | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        accumulation: str = "mean",
        gradients: str = "copy",
        overlap: bool = False,
        bucket: int = 1 << 18,
        gain: AdaScale | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool | None = False,
        differentiable: bool | None = False,
        choices: Sequence[tuple[str, Any, tuple[str, ...]]] = (),
        **unknown: Any,
    ) -> None:
        self._entered = True
        mine = world if isinstance(world, World) else World()
        self._owns_world = mine is not world
        self.world = mine
        self._built = self._closed = self._to_adopt = self._writing = False
        self._saving = self._shows_for_saving = False
        self._inside_worker = 0
        self._showing = ""
        self._warned: set[str] = set()
        self._handed_out = HandedOut()
        self._attached = AttachedModels()
        self._handles: list[Any] = []
        self._tile = tile
        self._micro_batches = MicroBatches(self.world.workers, accumulation)
        self._manner = gradients
        self._overlap = bool(overlap) and len(self.world.teams) > 1
        self._bucket = bucket
        self._loss_scale = 1.0
        self._gain = None
        self._device = None
        self._outcome = None
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        error: Exception | None = None
        prints: list[Fingerprint] = []
        try:
            refuse_unknown(type(self), unknown)
            if not (world is None or isinstance(world, World)):
                raise UsageError(f"world must be a World, not {world!r}")
            kind = Extrapolation(extrapolation, displacement, inner_clip, noise, seed)
            self._rule = Rule(self.RULE, kind, self.world.K)
            self._gain = None if gain is None else Gain(gain, self._rule, self.world.K)
            switches = {"capturable": capturable, "differentiable": differentiable}
            refuse_switches(switches, self.RULE, self._rule.flags)
            super().__init__(params, defaults | {"inner_lr": inner_lr, "maximize": bool(maximize)})
            keep_from_dynamo()
            layers, groups = self._describe()
            prints = self._fingerprints(layers, 0)
            self._device = device_for([str(p.device) for group in self.param_groups for p in group["params"]])
            check_tile(tile)
            check_bucket(bucket)
            check_max_norm(max_grad_norm)
            own = (("accumulation", accumulation, ("mean", "sum")), ("gradients", gradients, MANNERS))
            for name, value, allowed in (*choices, *own):
                check_choice(name, value, allowed)
        except Exception as caught:
            error = caught
        self.world.agree(error, self._title())
        require_same_order(self.world, prints)
        warn_of_shared_gpu(self.world, self._device)
        self._bind(self._make_core(layers, groups), layers, groups)
        if overlap and not self._overlap:
            self._warn_once("overlap=True has nothing to send during backward: all ranks share memory")

    def _title(self) -> str:
        """What the ranks must agree on before they construct."""
        gain = "" if self._gain is None else f" with {self._gain.estimator}"
        return title_on(type(self).__name__ + gain, self._device)

    # -- The step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @hooked_as_torchs
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
            begun = self._begun
            try:
                with torch.enable_grad():
                    loss = closure()
            finally:
                self._begun = begun  # whatever steps it took
        self._begun += 1
        self._require_open()
        capturing = self._core.captures
        if capturing and self._has_pending_state:
            raise UsageError("weights or state were loaded: take a step before you capture one")
        self._take_pending_state()
        try:
            take = self._prepared_step()
        except Exception as error:
            self._core.complain(describe(error))
            raise
        self._warn_of_mistakes()
        _, skipped, *_ = take()
        self._outcome = None
        self._forget_loaded_extra()
        self._rule.took()
        if capturing:
            self._captured = self._as_captured()
        self._binding.gradients.step_taken()
        self._micro_batches.reset()
        if not skipped:  # as far as the host knows: what a GPU decides it does not wait for
            self._binding.mark_stepped()
        return loss

    @staticmethod
    def profile_hook_step(func: Any) -> Any:
        """As torch's, which it calls for the step of a class of the user's own."""
        return with_torchs_hooks(func)

    def _tell_all(self, error: Exception) -> None:
        """Collective with the others' step: this rank's step failed before it began, and so does theirs."""
        if self._closed or self._core.captures:
            return
        with suppress(UsageError):
            self._binding.require_own_process()
            self._core.complain(describe(error))

    @property
    def grad_norm(self) -> float | None:
        """The norm of the last step's mean gradient before clipping, alike on all ranks; on a GPU, waits for it.

        None unless `max_grad_norm` or `skip_nonfinite` asks for it.
        """
        return (self._outcome or self._core.outcome)[0]

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped, on all ranks alike; on a GPU, waits for it."""
        return (self._outcome or self._core.outcome)[1]

    def prepare_replay(self) -> None:
        """Before each replay of a captured step: give it the groups' present learning rates and other numbers.

        While a stream captures, `step()` only records its work; nothing happens and nothing is counted. The step is
        taken when the recording is replayed, with numbers that this call writes where the recording reads them, so
        schedulers, momenta and bias corrections go on as usual. It waits until the last replay is through. Call it
        once for each replay, and on the stream on which you replay.

        One rank alone with one worker can capture, and only steps that the device takes without the host: none with a
        gain, `inner_lr="noise"` or a rule with trust ratios. `max_grad_norm` and `skip_nonfinite` may be captured, and
        the norm may change between replays, but not whether there is any of the two; `grad_norm` and `skipped` are the
        last replay's, and like checkpoints may be asked for before this call or after the replay, not in between. A
        `GradScaler`'s steps cannot be captured. Take a step with gradients of the same parameters before the capture.
        A step with gradients of others, or `add_param_group`, asks for a new capture.

        Raises:
            UsageError: if no step was captured, or the next one cannot be a replay of it.

        Example, on a GPU::

            opt = xc.Adam(model.parameters(), lr=1e-3)
            loss_fn(model(x), y).backward()  # x and y are where every batch will be
            opt.step()
            graph = torch.cuda.CUDAGraph()
            opt.zero_grad()
            with torch.cuda.graph(graph):
                loss_fn(model(x), y).backward()
                opt.step()
            for batch, labels in batches:
                x.copy_(batch)
                y.copy_(labels)
                opt.prepare_replay()
                graph.replay()
                scheduler.step()
        """
        self._require_open()
        if self._captured is None or self._core.captures:
            raise UsageError(
                "prepare_replay() comes before each replay of a step that was captured, outside of the capture"
            )
        self._take_pending_state()
        table = self._checked_table()
        self._captured.require_like(self._micro_batches.count(), self._binding.names, self._binding.params)
        norm, skips = self.max_grad_norm or 0.0, bool(self.skip_nonfinite)
        self._core.prepare_replay(table, self._captured.present, self._captured.divisor, norm, skips)
        self._outcome = None
        self._rule.took()
        self._micro_batches.reset()
        self._binding.mark_written()

    def _as_captured(self) -> Captured:
        grads = [param.grad for param in self._binding.params]
        addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        present = self._binding.present.copy()
        return Captured(present, self._divisor(), self._micro_batches.count(), addresses)

    def _advance(self, table: Any, *options: Any) -> tuple[float | None, bool, Any]:
        """Collective: the engine's step, without a gain."""
        return self._observed().step(table, *options)

    def _observed(self) -> ObservedCore:
        return ObservedCore(self._core, self._rule, self.param_groups)

    def scaled_step(self, scale: float, *args: Any, **kwargs: Any) -> Any:
        """Collective: `step` on gradients of a loss that was multiplied by `scale`; skipped if they overflowed."""
        if self._core.captures:
            raise UsageError(
                "a step with a GradScaler cannot be captured, as its scale changes: take skip_nonfinite=True, and "
                "bfloat16 or a scale of your own that stays"
            )
        before = self.skip_nonfinite
        self._loss_scale, self.skip_nonfinite = scale, True
        try:
            return self.step(*args, **kwargs)
        finally:
            self._loss_scale, self.skip_nonfinite = 1.0, before

    def unscaled(self, scale: float) -> None:
        """The present gradients were divided by a loss scale."""
        self._binding.gradients.watch_again()
        if self._micro_batches.squares is not None:
            self._micro_batches.squares.unscale(scale)

    def _checked_table(self) -> Any:
        self._require_outside("step()")
        if self._micro_batches.open:
            raise UsageError("step() inside no_sync(): the last micro-batch belongs outside")
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale
            raise UsageError(
                "torch's GradScaler sees this rank's gradients only, so the ranks' scales would part: use xc.GradScaler"
            )
        check_max_norm(self.max_grad_norm)
        self._members.require_same(self.param_groups)
        if not self._to_adopt:
            self._binding.require_own_weights(everywhere=True)
        for group, (flags, slots) in zip(self.param_groups, self._settled, strict=True):
            self._rule.check_fixed(group, flags, slots)
        if not self._core.captures or self._table is None:  # a recording gets its numbers before each replay
            self._table = self._rule.table(self.param_groups, self.world.K)
        if self._rule.extrapolation.name == "filter":
            for group in self.param_groups:
                for param in group["params"]:
                    shape, strides = param.shape, param.stride()
                    self._rule.check_filters("of this group", shape, strides, group["inner_lr"])
        return self._table

    def _prepared_step(self) -> Callable[[], tuple[Any, ...]]:
        """The engine's step, its arguments checked."""
        table = self._checked_table()
        gradients = self._binding.gradients
        gradients.require_one_thread()
        gradients.witnesses.check()
        gradients.witnesses.require_whole()
        gradients.collect()
        gradients.report_changes()
        divisor, max_norm = self._divisor(), self.max_grad_norm or 0.0
        options = (self._binding.present, True, divisor, max_norm, bool(self.skip_nonfinite))
        if self._gain is None:
            return partial(self._advance, table, *options)
        gathered = self._gathered()
        self._gain.require(gathered, self.param_groups)
        return partial(self._gain.step, self._observed(), table, self.param_groups, gathered, options)

    def _gathered(self) -> Gathered:
        """What the gain is measured from."""
        count, squares = self._micro_batches.count(), self._micro_batches.squares
        factor = self._micro_batches.divisor() / count
        if squares is None:
            return Gathered(self.world.K, count, factor)
        return Gathered(count, 1, factor, squares.spread(self._loss_scale) if count > 1 else None)

    def _divisor(self) -> float:
        """What every gradient is divided by, beside the number of workers."""
        divisor = self._micro_batches.divisor() * self._loss_scale
        if not 0 < divisor < math.inf:
            raise UsageError(f"the loss scale must be a positive number, not {self._loss_scale}")
        return divisor

    def _warn_of_mistakes(self) -> None:
        """What is probably not meant, each once."""
        misled = "uses another norm on each rank" if self.world.K > 1 else "is taken for noise by the gain"
        if (self.world.K > 1 or self._gain is not None) and self._binding.gradients.was_rescaled():
            self._warn_once(
                "this rank's gradients were changed between backward() and step(). Clipping them there "
                f"(clip_grad_norm_) {misled}: set max_grad_norm instead, which clips the mean"
            )
        self._binding.gradients.forget_rescaling()
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
        self._micro_batches.reset()
        self._binding.gradients.forget_rescaling()
        if set_to_none or (set_to_none is None and self._manner != "view"):
            self._binding.gradients.forget()
        else:
            self._binding.gradients.zero()

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
        self._require_open()
        gradients, bound = self._binding.gradients, self._binding.bound
        gradients.watch_trained()
        before = gradients.marks()
        with self._micro_batches.one_more(bound):
            try:
                yield
            except BaseException:
                if self._micro_batches.passes_seen or (
                    not self._micro_batches.switched and gradients.marks() != before
                ):
                    self._micro_batches.break_off(bound)
                raise
            gradients.end_micro_batch()

    @property
    def overlapped_part(self) -> float:
        """The part of this rank's sums that were complete when the last step began; 0 without `overlap`."""
        return self._core.early_part

    @property
    def last_step_seconds(self) -> float:
        """How long the last step took inside the compiled part, in seconds, waiting included."""
        return self._core.last_step_seconds
