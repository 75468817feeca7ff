"""A torch optimizer whose parameters lie in an engine's memory: its workers, and who writes the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch

from . import _core, hooks
from ._version import __version__
from .arrays import form_of
from .binding import Binding, strided
from .device import core_on
from .errors import UsageError, describe
from .gain import Gain
from .handed_out import HandedOut
from .hyper import Rule
from .members import Members
from .micro_batches import MicroBatches
from .model_methods import restore_methods
from .observed import Numbers
from .order import AttachedModels, Fingerprint, fingerprints
from .ownership import forget_derived
from .registered import remove_all
from .replay import Captured
from .state_entries import digest_of_numbers
from .world import World, log

__all__ = ["BoundOptimizer"]

Core = _core.Engine
Device = _core.Device

# Arguments that stand for flags and are the same for all groups.
CHOICES = ("trust", "layer_mean")


class BoundOptimizer(torch.optim.Optimizer):
    """What an optimizer here has beside its step; `FusedOptimizer` constructs it."""

    RULE = ""
    world: World
    _rule: Rule
    _tile: int | None
    _manner: str
    _overlap: bool
    _bucket: int
    _core: Core
    _device: Device | None
    _binding: Binding
    _members: Members
    _micro_batches: MicroBatches
    _handed_out: HandedOut
    _attached: AttachedModels
    _handles: list[Any]  # of the hooks on attached models
    _gain: Gain | None
    _settled: list[tuple[int, bool]]  # of each group, what its engine was built for
    _table: Numbers | None  # of all groups, at the last step
    _captured: Captured | None
    _outcome: tuple[float | None, bool] | None  # of the last step, if that was another core's
    _owns_world: bool
    _built: bool
    _collected: bool  # the state of all hosts can be read
    _closed: bool
    _showing: str  # the open context that has other weights in the model; empty if none
    _to_adopt: bool
    _writing: bool  # master_weights(write=True) is open
    _saving: bool  # a state_dict() is being made,
    _shows_for_saving: bool  # and the model has the master weights meanwhile
    _inside_worker: int  # so many worker() are open
    _calls = 0  # so many calls of the library's own step
    _begun = 0  # so many steps that tell the other ranks of their failures themselves

    def _make_core(self, layers: list[Any], groups: list[Any]) -> Core:
        """Collective: an engine for these groups."""
        options = (self.RULE, self._rule.extrapolation.for_core(), self._tile, __version__)
        bucket = self._bucket if self._overlap else 0
        core = Core(self.world.team, layers, groups, *options, bucket=bucket, device=self._device)
        on_device: Core = core_on(self._device, "torch", core)
        return on_device

    def _bind(self, core: Core, layers: list[Any], groups: list[Any]) -> None:
        """Collective: rank 0's weights into this engine, and the model into its memory."""
        self._core = core
        self._built = True
        self._table = None
        self._rule.table(self.param_groups, self.world.K)
        self._rule.took()
        self._captured = None
        self._settled = [
            (self._rule.flag_bits(group), self._rule.has_buffer(group)) for group in self.param_groups
        ]
        params = [p for group in self.param_groups for p in group["params"]]
        names = [name for name, *_ in layers]
        self._members = Members(self.param_groups, names)
        workers, batches = self.world.workers, self._micro_batches
        self._binding = Binding(core, params, names, workers, self._manner, batches, self._overlap)
        self._micro_batches.reset()
        if self._gain is not None and self.world.K == 1:
            self._micro_batches.watch([group["params"] for group in self.param_groups])
        self._binding.copy_initial()
        self._core.adopt(0)
        self._core.watch_writes()
        self._binding.show(0)
        self._declare_names()

    def _declare_names(self) -> None:
        """Have every step compare how attached models name the parameters."""
        digest = self._attached.digest(self._binding.index)
        self._core.declare(_core.Declared.attached_names, digest)

    def _describe(self) -> tuple[list[Any], list[Any]]:
        """The engine's layers and groups."""
        layers, groups, seen = [], [], set()
        for g, group in enumerate(self.param_groups):
            if chosen := [name for name in CHOICES if name in group]:
                raise UsageError(
                    f"{' and '.join(chosen)} is for the whole optimizer, not for a group of parameters"
                )
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                if id(param) in seen:
                    raise UsageError(f"parameter {name!r} is given twice")
                seen.add(id(param))
                if torch.nn.parameter.is_lazy(param):
                    raise UsageError(
                        f"parameter {name!r} of a lazy module has no shape yet: run the model once before you construct"
                    )
                if param.is_inference():
                    raise UsageError(
                        f"parameter {name!r} was made in torch.inference_mode() and can never be trained: make the "
                        "model outside of it"
                    )
                if not (param.is_floating_point() or param.is_complex()):
                    raise UsageError(
                        f"parameter {name!r} has elements of type {str(param.dtype).removeprefix('torch.')}, which are "
                        "never trained: give [p for p in model.parameters() if p.requires_grad]"
                    )
                form = form_of(param, f"parameter {name!r}")
                self._rule.check_filters(name, form.shape, form.strides, group["inner_lr"])
                layers.append((name, form.dtype, form.shape, form.strides, g))
            groups.append(self._rule.for_core(group, self.world.K, g))
        return layers, groups

    def _fingerprints(self, layers: list[Any], first: int) -> list[Fingerprint]:
        """Return the fingerprints of the parameters of the groups from `first` on, which the ranks compare."""
        if self.world.size == 1:
            return []
        params = [p for group in self.param_groups[first:] for p in group["params"]]
        names = [name for name, *_ in layers[len(layers) - len(params) :]]
        return fingerprints(params, names)

    # -- Workers -------------------------------------------------------------------------------------------------

    @contextmanager
    def worker(self, v: int) -> Iterator[None]:
        """Within the context the model has the weights and gradients of this rank's worker v.

        Args:
            v: 0 <= v < world.workers.

        Raises:
            UsageError: for another v.
        """
        v = self._checked_worker(v)
        before = self._binding.bound
        self._require_outside("worker()")
        self._binding.require_own_process()
        if v != before and not self._to_adopt:
            self._require_own_weights()
        self._switch(v)
        self._micro_batches.saw(v)
        self._inside_worker += 1
        depth = self._inside_worker
        try:
            yield
        finally:
            self._inside_worker -= 1
            if self._inside_worker >= depth:
                raise UsageError("the contexts of worker() must end in the reverse order of their beginnings")
            self._leave_for(before if self._inside_worker else 0)

    def _checked_worker(self, v: int) -> int:
        if not isinstance(v, Integral) or isinstance(v, bool) or not 0 <= v < self.world.workers:
            raise UsageError(f"there is no worker {v!r}; this rank drives {self.world.workers}, from 0")
        return int(v)

    def _leave_for(self, v: int) -> None:
        """Go back to worker v. What others wrote into the one that is left is an error at the next step."""
        self._require_outside("the end of worker()")
        self._binding.require_own_process()
        if v != self._binding.bound and not self._to_adopt:
            self._binding.ownership.notice()
        self._switch(v, back=True)

    def _switch(self, v: int, back: bool = False) -> None:
        if v == self._binding.bound:
            return
        ownership = self._binding.ownership
        if self._to_adopt and self._binding.bound == 0:
            self._binding.take_over()
        self._binding.switch(v, back)
        if self._to_adopt:
            ownership.copy_shown_to(v)
            ownership.record()

    # -- Who writes the weights ----------------------------------------------------------------------------------

    def _begin_loading(self) -> None:
        """The model gets the master weights but where others wrote into it; what is loaded then goes over them.

        Between averagings a worker's own weights are no displaced ones: they stay.
        """
        if self._binding.bound != 0:
            raise UsageError(
                "load_state_dict() inside worker(): leave the context first; rank 0's first worker loads"
            )
        ownership = self._binding.ownership
        if self._to_adopt or ownership.holds_master:  # of a module that contains this one
            return
        written = ownership.loading_begins()
        if self._core.local_steps is not None:
            return
        with self._binding.kept(written):
            self._core.show_master(0)
            self._core.keep_master(0)
        ownership.mark_filled(written)

    def adopt(self) -> None:
        """Collective: take rank 0's present weights as the master weights of all, undisplaced; keep the rule's state.

        Raises:
            UsageError: on every rank, if one is inside `worker()`, `master_weights()` or `kept_weights()`, or if a
                parameter was replaced by one of another shape or type.
        """
        self._adopt_shown()
        self._handed_out.forget()

    def _adopt_shown(self) -> None:
        """Collective: as adopt(), but writes into what `model.state_dict()` gave are still errors."""
        self._require_open()
        try:
            self._require_outside("adopt()")
            if self._binding.bound != 0:
                raise UsageError("adopt() inside worker(): leave the context first")
            self._binding.take_over()
        except Exception as error:
            self._core.complain(describe(error))
            raise
        self._adopt()

    def _adopt_pending(self) -> None:
        """Collective: adopt what the model has loaded, if all ranks agree on what else was written before."""
        try:
            kept = self._binding.ownership.written_before_loading()
        except UsageError as error:
            self._core.complain(describe(error))
            raise
        self._core.declare(_core.Declared.kept_writes, digest_of_numbers(kept) if kept else 0)
        try:
            self._adopt_shown()
        finally:
            self._core.declare(_core.Declared.kept_writes, 0)

    def _adopt(self) -> None:
        self._core.adopt(0)
        self._to_adopt = False
        self._binding.ownership.adopted()

    def _require_own_weights(self) -> None:
        """Complain on all ranks if somebody else wrote or replaced a parameter."""
        try:
            self._binding.require_own_weights()
        except UsageError as error:
            if not self._closed:
                self._core.complain(describe(error))
            raise

    def _require_outside(self, call: str) -> None:
        """Complain about a call inside a context that has other weights in the model."""
        if self._showing:
            raise UsageError(f"{call} inside {self._showing}(): leave the context first")
        if self._saving:
            raise UsageError(f"{call} inside state_dict() of an attached model: call it afterwards")

    def _require_saveable(self) -> None:
        """Complain about groups that were edited by hand: on all ranks, if all of them must take part in saving."""
        try:
            self._members.require_same(self.param_groups)
        except UsageError as error:
            if len(self.world.teams) > 1 and not (self._collected or self._closed):
                self._core.complain(describe(error))
            raise

    def attach(self, model: torch.nn.Module) -> None:
        """Let the model save and load the master weights.

        Afterwards `model.state_dict()` gives the master weights, whatever the worker's displacement, so the usual
        `torch.save(model.state_dict(), ...)` on rank 0 saves the right model; and after `model.load_state_dict()`,
        which every rank must call, the next step adopts what was loaded. `model.zero_grad()` does what the optimizer's
        `zero_grad()` does, so that it reaches all workers and the count of micro-batches; that of a module with a part
        of the parameters reaches all workers' gradients of these.

        Args:
            model: any module that contains parameters of this optimizer.

        Raises:
            UsageError: if it contains none.
        """
        hooks.attach(self, model)

    def master(self, i: int) -> torch.Tensor:
        """A copy of the i-th parameter's master weights, float32 (float64 for float64). Not collective."""
        return strided(self._core.read(i, 0), self._binding.ownership.forms[i])

    @contextmanager
    def master_weights(self, write: bool = False) -> Iterator[None]:
        """Within the context the model holds the master weights, the same on all ranks: evaluate and save here.

        Afterwards it holds what it held before, bit for bit. Not collective: one rank may evaluate while the others
        wait at the next step.

        Args:
            write: collective then: on leaving, rank 0's weights become the master weights of all.

        Raises:
            UsageError: if somebody else wrote or replaced a parameter before, on every rank with `write`; or inside,
                without `write`, as that would be lost.
        """
        self._require_open()
        if self._saving and not write and self._holds_what_is_saved:
            yield
            return
        self._require_outside("master_weights()")
        if self._to_adopt and write:
            self._adopt_pending()
        if self._to_adopt:  # the model holds what the next step adopts
            with self._kept_to_adopt("master_weights"):
                yield
            return
        self._require_showable(write)
        self._core.show_master(self._binding.bound)
        self._showing, self._writing = "master_weights", write
        self._binding.mark_written()
        forget_derived()
        try:
            yield
        except BaseException as error:
            self._hide_master()
            if write and not self._closed:
                self._core.complain(f"master_weights(write=True) was left by {type(error).__name__}: {error}")
            raise
        if write and not self._closed:
            self._commit()
            return
        try:
            if self._showing:
                self._binding.ownership.require_master()
        finally:
            self._hide_master()

    def _require_showable(self, write: bool) -> None:
        """Complain if the model cannot show the master weights: on all ranks, if they are to be written."""
        try:
            if write and self._binding.bound != 0:
                raise UsageError("master_weights(write=True) inside worker(): leave the context first")
            self._binding.require_own_weights()
        except UsageError as error:
            if write:
                self._core.complain(describe(error))
            raise

    def _commit(self) -> None:
        """Collective: the weights that the model shows become the master weights of all."""
        try:
            self._binding.take_over()
        except Exception as error:
            self._hide_master()
            self._core.complain(describe(error))
            raise
        try:
            self._adopt()
        except Exception:  # another rank left the context by an error, so nothing is committed
            self._hide_master()
            raise
        self._handed_out.forget()
        self._showing, self._writing = "", False

    @contextmanager
    def _kept_to_adopt(self, context: str) -> Iterator[None]:
        """Afterwards the model holds again what the next step adopts."""
        with self._binding.kept() as values:
            self._showing = context
            try:
                yield
                if context == "master_weights":
                    self._binding.ownership.require_values(values)
            finally:
                self._showing = ""

    @contextmanager
    def kept_weights(self) -> Iterator[None]:
        """Within the context you may write other weights into the model for a while, or replace `p.data`.

        Afterwards it holds what it held before, bit for bit, also after an exception: this worker's weights, as the
        optimizer wrote them. Gradients stay. Not collective. It takes a copy of the weights.

        Raises:
            UsageError: if somebody else had written or replaced a parameter before.

        Example:
            >>> import torch, extrapcomm as xc
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = xc.SGD(model.parameters(), lr=0.1)
            >>> with opt.kept_weights(), torch.no_grad():
            ...     _ = model.weight.zero_()
            ...     print(model.weight.tolist())
            [[0.0, 0.0]]
            >>> bool(model.weight.any())
            True
            >>> opt.close()
        """
        self._require_open()
        self._require_outside("kept_weights()")
        if self._to_adopt:
            with self._kept_to_adopt("kept_weights"):
                yield
            return
        self._binding.require_own_weights()
        values = self._binding.ownership.copies()
        self._showing = "kept_weights"
        try:
            yield
        finally:
            self._showing = ""
            if self._closed:  # the engine's memory has the master weights
                self._binding.ownership.show_again()
            else:
                self._binding.ownership.restore(values)

    def _hide_master(self) -> None:
        if not self._showing:
            return  # closed meanwhile
        self._showing, self._writing = "", False
        if not self._binding.ownership.is_in_place():
            self._binding.ownership.show_again()
        self._core.hide_master(self._binding.bound)
        self._binding.mark_written()
        forget_derived()

    @contextmanager
    def _while_saving(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the context a state_dict of the model is made, with w in the model if that matters to what is saved.

        Autograd is not told, because nothing but saving happens meanwhile.
        """
        self._saving = True
        try:
            if self._showing or self._to_adopt or not self._can_show_for(model):
                yield
                return
            self._core.show_master(self._binding.bound)
            self._shows_for_saving = True
            forget_derived()
            try:
                yield
            finally:
                self._shows_for_saving = False
                if not self._closed:
                    self._core.hide_master(self._binding.bound)
                forget_derived()
        finally:
            self._saving = False

    @property
    def _is_displaced(self) -> bool:
        return any(self._core.displaced(i) for i in range(len(self._binding.params)))

    @property
    def _holds_what_is_saved(self) -> bool:
        """True if the model holds w, or the weights that the next step adopts."""
        return self._shows_for_saving or self._to_adopt or not self._is_displaced

    def _can_show_for(self, model: torch.nn.Module) -> bool:
        return self._is_displaced and hooks.computes_what_it_saves(model) and self._binding.ownership.is_own()

    def _zero_some(self, which: list[int], set_to_none: bool) -> None:
        """Zero or drop the gradients of these parameters, which the model's own zero_grad() has just treated so.

        Within `worker()` the others of this rank's workers keep theirs.
        """
        if not which:
            return
        binding, whole = self._binding, len(which) == len(self._binding.index)
        binding.require_own_process()
        if self._inside_worker:
            binding.gradients.witnesses.forget_bound(which)
            if whole:
                self._micro_batches.forget(binding.bound)
        elif whole:
            self.zero_grad(set_to_none)
        else:
            binding.gradients.forget_rescaling()
            if not binding.gradients.clear_some(which, set_to_none):  # others have none, or zeros
                self._micro_batches.reset()
                binding.gradients.witnesses.forget()

    def sync_buffers(self, model: torch.nn.Module, how: str = "broadcast") -> None:
        """Collective: make the model's buffers (BatchNorm's running statistics) alike on all ranks.

        Args:
            model: whose buffers.
            how: "broadcast" takes rank 0's; "average" takes the mean of floating-point ones, rank 0's of the others.

        Raises:
            UsageError: for another `how`.
        """
        hooks.sync_buffers(self.world, model, how)

    # -- Its end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the master weights in the model and end this rank's part. Idempotent, not collective.

        Weights that were loaded or written and not adopted yet stay as they are.
        """
        if self._closed:
            return
        if self._showing == "master_weights":
            self._hide_master()
        ownership = self._binding.ownership
        held = ownership.held()
        if self._to_adopt:
            kept = held
        elif self._showing or self._binding.bound != 0:
            kept = []
        else:
            kept = self._written_to_stay(held)
        if self._binding.bound != 0:
            ownership.show_first_of(held)
        self._binding.remove_hooks()
        self._micro_batches.unwatch()
        self._closed = True
        for model in self._attached.living():
            restore_methods(model)
        remove_all(self._handles)
        with self._binding.kept(kept):
            self._core.close()
            ownership.end(held)
        if self._owns_world:
            self.world.close()

    def _written_to_stay(self, held: Sequence[int]) -> list[int]:
        """The parameters in the engine's memory that others have written, and whose values close() must not replace."""
        ownership = self._binding.ownership
        inside = {
            i
            for i, param in enumerate(ownership.params)
            if ownership.parameter_at(param.data_ptr()) is not None and not ownership.is_taken(param)
        }
        return [i for i in range(len(ownership.params)) if i in inside.union(held) and self._has_writes(i)]

    def _has_writes(self, i: int) -> bool:
        """Return true if others have written parameter i; warn if that cannot be told."""
        ownership = self._binding.ownership
        if ownership.may_be_as_before(i):
            log.warning(
                "parameter %r was written outside the optimizer, and may have the values from before again: the master "
                "weights are taken for it. Call opt.adopt() if what was written is to stay, and write inside "
                "opt.kept_weights() if it is not",
                self._binding.names[i],
            )
        return ownership.has_writes(i)

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
