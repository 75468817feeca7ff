"""The engine's weights and state as torch.optim's dictionaries, and back; and the optimizer's methods for that."""

import copy
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray

from . import _core, hooks
from .binding import strided
from .bound import BoundOptimizer
from .errors import Error, UsageError, describe
from .hyper import Rule
from .live_state import LiveState
from .modes import outside_inference
from .order import Fingerprint, require_same_order
from .ownership import bytes_of
from .state_entries import (
    KEPT_STATE,
    MASTER,
    Layer,
    StateEntries,
    digest_of,
    flat_master,
    has_only_counts,
    has_own_master,
    is_nothing,
    step_count,
)
from .switches import without_inert
from .world import log

__all__ = ["Checkpoints"]

Core = _core.Engine
Masters = dict[int, NDArray[Any]]

# The key of what torch.optim has no place for: a version, the master weights, and what gain and noise have measured.
KEY = "extrapcomm"
VERSION = 1


def groups_of(state_dict: Mapping[str, Any], current: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups, completed by the present values of what they do not have."""
    try:
        saved = list(state_dict["param_groups"])
        sizes = [len(group["params"]) for group in saved]
    except (KeyError, TypeError):
        raise UsageError("this is not an optimizer's state_dict: it has no param_groups") from None
    if sizes != [len(group["params"]) for group in current]:
        raise UsageError(
            f"the state_dict has groups of {sizes} parameters, the optimizer of "
            f"{[len(group['params']) for group in current]}"
        )
    return [{**now, **without_inert(then)} for now, then in zip(current, saved, strict=True)]


def extra_of(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a state_dict that torch.optim has no place for; empty if the dict has passed through torch.

    Raises:
        UsageError: if it is of a later version of this library.
    """
    extra = state_dict.get(KEY, {})
    if not isinstance(extra, Mapping) or not isinstance(version := extra.get("version", VERSION), int):
        raise UsageError(f"the state_dict's {KEY!r} is not what state_dict() has written")
    if version > VERSION:
        raise UsageError(
            f"the state_dict's {KEY!r} is of version {version}, and this library reads up to {VERSION}: update it"
        )
    return extra


def layers_of(state_dict: Mapping[str, Any], entries: StateEntries) -> tuple[list[Layer], Masters]:
    """Return the layers that the engine loads, and master weights of unknown age that only the rule's state has."""
    state, trusted = state_dict.get("state"), extra_of(state_dict).get(MASTER, {})
    if not isinstance(state, Mapping) or not isinstance(trusted, Mapping):
        raise UsageError("this is not an optimizer's state_dict: it has no state")
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    layers: list[Layer] = []
    found: Masters = {}
    for i, (index, param) in enumerate(zip(order, entries.forms, strict=True)):
        entry = state.get(index) or {}
        if not isinstance(entry, Mapping):
            raise UsageError(f"the state_dict's state of parameter {index} is a {type(entry).__name__}")
        weights = flat_master(trusted.get(index), param)
        _, slots, updates = entries.layer(i, entry)
        layers.append((weights, slots, updates))
        if weights is None and not is_nothing(entry.get(MASTER)):
            found[i] = _array(entry[MASTER], param)
    return layers, found


def _array(value: Any, param: torch.Tensor) -> NDArray[Any]:
    array = flat_master(value, param)
    assert array is not None
    return array


@outside_inference
def local_state_of(core: Core, rule: Rule, i: int) -> dict[str, Any]:
    """The part of one parameter's weights and state that this rank updates."""
    begin, end = core.owned(i)
    names = [MASTER, *rule.slots[: core.slots]]
    parts = {name: torch.from_numpy(core.read(i, slot, (begin, end))) for slot, name in enumerate(names)}
    return {"range": (begin, end), "step": core.updates(i), "begun": core.begun(i), **parts}


def local_layers_of(
    state_dict: Mapping[str, Any], core: Core, rule: Rule, params: Sequence[torch.Tensor]
) -> tuple[list[Layer], int]:
    """What this rank's part of the engine loads, and a digest of what must be alike on all ranks."""
    state = state_dict["state"]
    if list(state) != list(range(len(params))):
        raise UsageError(f"this state has {len(state)} parameters, the optimizer has {len(params)}")
    layers = [_local_layer(state[i], core, rule, i, param) for i, param in enumerate(params)]
    digest = hashlib.blake2b(repr([updates for *_, updates in layers]).encode(), digest_size=8)
    return layers, int.from_bytes(digest.digest(), "little")


def _local_layer(entry: Mapping[str, Any], core: Core, rule: Rule, i: int, param: torch.Tensor) -> Layer:
    """Arrays of the whole parameter; the engine takes the part that this rank updates."""
    begin, end = core.owned(i)
    if tuple(entry["range"]) != (begin, end):
        raise UsageError(
            f"this state has elements {tuple(entry['range'])} of a parameter, not {(begin, end)}"
        )
    whole = []
    for name in (MASTER, *rule.slots[: core.slots]):
        if name not in entry or entry[name].shape != (end - begin,):
            raise UsageError(f"this state has no {name!r} of {end - begin} elements for parameter {i}")
        array = torch.zeros(param.numel(), dtype=entry[name].dtype, device="cpu")
        array[begin:end] = entry[name]
        whole.append(_array(array.as_strided(param.shape, param.stride()), param))
    count = step_count(entry["step"])
    slots: list[NDArray[Any] | None] = list(whole[1:])
    if count and not entry.get("begun", True):
        slots = [None] * len(slots)
    return whole[0], slots, count


@contextmanager
def collected(core: Core, only_rank: int | None = None) -> Iterator[None]:
    """Collective where several hosts share the state: all of it can be read inside, by all ranks or by one."""
    core.collect_state(only_rank)
    try:
        yield
    finally:
        core.forget_collected()


def snapshot(core: Core, count: int) -> list[Layer]:
    """Collective: weights and state of an engine's first layers."""

    def slots_of(i: int) -> list[NDArray[Any] | None]:
        empty = has_only_counts(core, i)
        return [None if empty else core.read(i, s) for s in range(1, core.slots + 1)]

    with collected(core):
        return [(core.read(i, 0), slots_of(i), core.updates(i)) for i in range(count)]


def restore(core: Core, saved: list[Layer], count: int) -> None:
    """Collective: give a snapshot to an engine of `count` layers; those that it does not have start afresh."""
    empty: list[NDArray[Any] | None] = [None] * core.slots
    layers: list[Layer] = [(weights, (slots + empty)[: core.slots], n) for weights, slots, n in saved]
    layers += [(None, list(empty), 0)] * (count - len(saved))
    core.load(layers, 0)


def _wanted_whole() -> bool:
    """Returns true if torch.distributed.checkpoint called `state_dict()`: what it gets is its template for loading."""
    frame = sys._getframe(1)
    while frame.f_code.co_name == "state_dict" and frame.f_back is not None:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith("torch.distributed.checkpoint")


class Checkpoints(BoundOptimizer):
    """Saving, loading, and parameters that are added later."""

    _collected = False  # the state of all hosts can be read
    _found_masters: Masters  # loaded with the rule's state, and resolved at the next step
    _loaded_extra = 0  # a digest, compared at the next step
    _live: LiveState | None = None

    # -- The state as a mapping ----------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The rule's state of each parameter, as torch.optim's: `step` and the rule's slots.

        The mapping reads from the engine. Values are copies; not collective on one host, and to be read inside
        `collected_state()` on several. An assignment or a deletion, which every rank must make alike, is staged and
        takes effect at the next step. A copy that was written in place is an error there.
        """
        return {} if self._live is None else self._live

    @state.setter
    def state(self, state: Any) -> None:
        if self._live is not None:
            self._live.replace(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != "state"})

    def _bind(self, core: Core, layers: list[Any], groups: list[Any]) -> None:
        super()._bind(core, layers, groups)
        self._entries = StateEntries(core, self._rule, self._binding)
        if self._live is None:
            self._found_masters = {}
            self._live = LiveState(
                lambda: self._entries,
                self._require_readable_state,
                self._require_writable_state,
                lambda i: self._binding.names[i],
            )

    def _require_readable_state(self) -> None:
        if len(self.world.teams) > 1 and not self._collected:
            raise UsageError(
                "on several hosts each rank has a part of the state: read opt.state inside "
                "`with opt.collected_state():`, which every rank must enter"
            )

    def _require_writable_state(self) -> None:
        self._require_open()
        if self._core.local_steps is not None:
            raise UsageError("local steps keep a state for each worker, so opt.state cannot be changed now")

    @property
    def _has_pending_state(self) -> bool:
        """True if the next step has weights or state to take in before its own work."""
        return self._to_adopt or bool(self._found_masters) or bool(self._live and self._live.digest)

    def _take_pending_state(self) -> None:
        """Collective if anything is pending: adopt loaded weights, then apply staged state and found masters."""
        assert self._live is not None
        try:
            self._live.require_unwritten()
            self._handed_out.require_unwritten()
            if self._to_adopt:
                self._binding.ownership.require_not_taken()
            elif self._has_pending_state:  # what is loaded would hide writes into the weights
                self._binding.require_own_weights(everywhere=True)
        except UsageError as error:
            self._core.complain(describe(error))
            raise
        if self._to_adopt:
            self._adopt_loaded()
        if digest := self._live.digest:
            self._load_some(self._live.layers(), digest)
            self._live.applied()
        if self._found_masters:
            self._resolve_masters()
        if self._loaded_extra:
            self._core.declare(_core.Declared.assigned_state, self._loaded_extra)

    def _adopt_loaded(self) -> None:
        """Collective: adopt what the model has loaded, and keep master weights that round to it."""
        short = [i for i, param in enumerate(self._binding.params) if has_own_master(param)]
        before: Masters = {}
        if short:
            with self.collected_state():
                before = {i: self._core.read(i, 0) for i in short if i not in self._found_masters}
        self._adopt_pending()
        layers: dict[int, Layer] = {
            i: (master, *KEPT_STATE) for i, master in before.items() if self._fits(i, master)
        }
        if layers:
            self._load_some(layers, digest_of(list(layers.values())))

    def _forget_loaded_extra(self) -> None:
        """The step happened, so all ranks had loaded the same."""
        if self._loaded_extra:
            self._loaded_extra = 0
            self._core.declare(_core.Declared.assigned_state, 0)

    def _load_some(self, some: Mapping[int, Layer], digest: int) -> None:
        """Collective: load these layers; the others keep weights and state."""
        layers = [some.get(i, (None, *KEPT_STATE)) for i in range(len(self._binding.params))]
        self._core.declare(_core.Declared.assigned_state, digest)
        try:
            self._core.load(layers, digest)
        finally:
            self._core.declare(_core.Declared.assigned_state, 0)
        self._binding.mark_written()

    def _resolve_masters(self) -> None:
        """Use master weights that only the rule's state had, where they round to the weights that are there."""
        fitting = {i: master for i, master in self._found_masters.items() if self._fits(i, master)}
        stale = next((i for i in self._found_masters if i not in fitting), None)
        layers: dict[int, Layer] = {
            i: (master, *KEPT_STATE)
            for i, master in fitting.items()
            if has_own_master(self._binding.params[i])  # others have these very values
        }
        if layers:
            self._load_some(layers, digest_of(list(layers.values())))
        self._found_masters = {}  # not before: after an error of another rank, all ranks must have the same
        if stale is not None:
            log.warning(
                "the loaded optimizer state has master weights of parameter %r that are not those of the model: the "
                "model's weights are taken, here and wherever they differ",
                self._binding.names[stale],
            )

    def _fits(self, i: int, master: NDArray[Any]) -> bool:
        """Returns true if a master, rounded to the parameter's type, has the bits of the weights that are there."""
        param = self._binding.params[i]
        here = param.detach() if self._to_adopt else self.master(i).to(param.dtype)
        return torch.equal(
            bytes_of(strided(master, self._binding.ownership.forms[i]).to(param.dtype)), bytes_of(here)
        )

    # -- Saving --------------------------------------------------------------------------------------------------

    def state_dict(self, rank0_only: bool = False) -> dict[str, Any]:
        """torch.optim's dict of the same rule; under "extrapcomm" what torch.optim has no place for.

        torch.optim's optimizer of the same name loads it. `["extrapcomm"]` has a `version`, the `master` weights by
        parameter, and `extra_state_dict()`. Parameters in 16 bits have `state[i]["master"]` as well, for libraries
        that keep nothing but `state` and `param_groups`. Parameters that were never updated have no state, except in
        the templates that `torch.distributed.checkpoint` asks for.

        Not collective on one host. Ranks on several hosts must all call it, because each has a part of the state.

        The displacements are not in it: after loading, every worker starts from the master weights. An `inner_lr` that
        is a function is left out.

        Args:
            rank0_only: the other ranks take part but get a dict with an empty `state` and without master weights: less
                memory and traffic.
        """
        whole = _wanted_whole()
        self._require_saveable()
        self._run_saving_hooks()
        packed: dict[str, Any] = {"state": {}, "param_groups": self._packed_groups()}
        packed[KEY] = {"version": VERSION}
        with self.collected_state(0 if rank0_only else None):
            if not rank0_only or self.world.rank == 0:
                params = range(len(self._binding.params))
                live = self._live_state
                packed["state"] = {
                    i: self._saved_entry(i, whole)
                    for i in params
                    if whole or live.has_state(i) or live.only_counts(i)
                }
                packed[KEY][MASTER] = {i: self._saved_master(i) for i in params}
                self._warn_of_writes()
        packed[KEY] |= self.extra_state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            result = hook(self, packed)
            packed = packed if result is None else result
        return packed

    def _warn_of_writes(self) -> None:
        """Tell of weights that the model has and that are not saved."""
        if self._closed or self._to_adopt or self._showing:
            return
        ownership = self._binding.ownership
        written = next((i for i in range(len(ownership.params)) if ownership.is_written(i)), None)
        if written is not None:
            log.warning(
                "parameter %r was written or replaced outside the optimizer, and state_dict() saves the master weights "
                "from before: call opt.adopt() first if what was written is to stay",
                self._binding.names[written],
            )

    def _run_saving_hooks(self) -> None:
        try:
            for hook in self._optimizer_state_dict_pre_hooks.values():
                hook(self)
        except Exception as error:
            if len(self.world.teams) > 1 and not self._collected:
                self._core.complain(describe(error))
            raise

    @property
    def _live_state(self) -> LiveState:
        assert self._live is not None
        return self._live

    def _saved_entry(self, i: int, whole: bool) -> dict[str, Any]:
        """Parameter i's entry; a `whole` one has all keys."""
        keys, only_counts = self._entries.keys(i), self._live_state.only_counts(i)
        if only_counts and not whole:
            keys = [key for key in keys if key in ("step", MASTER)]
        entry = {
            key: self._saved_master(i) if key == MASTER else self._live_state.read(i, key) for key in keys
        }
        if only_counts and whole:
            entry["step"].zero_()  # so that what is loaded has not begun
        return entry

    def _saved_master(self, i: int) -> torch.Tensor:
        if i in self._found_masters and self._fits(i, self._found_masters[i]):
            return strided(self._found_masters[i].copy(), self._binding.ownership.forms[i])
        master = self.master(i)
        if self._to_adopt and not self._fits(i, master.as_strided((master.numel(),), (1,)).numpy()):
            # The next step takes what the model holds.
            return self._binding.params[i].detach().to(master, copy=True)
        return master

    @contextmanager
    def collected_state(self, only_rank: int | None = None) -> Iterator[None]:
        """Collective: inside, `state_dict()` needs no other rank, also where ranks on several hosts share the state.

        For libraries in which rank 0 alone saves: all ranks enter, and rank 0 saves inside.

        Args:
            only_rank: the one that reads it; by default all may.
        """
        if self._collected:
            yield
            return
        with collected(self._core, only_rank):
            self._collected = True
            try:
                yield
            finally:
                self._collected = False

    def _packed_groups(self) -> list[dict[str, Any]]:
        """The groups without what cannot be saved, and with the parameters' numbers in their place."""
        index = self._binding.index
        packed = []
        for group in self.param_groups:
            values = {k: v for k, v in group.items() if not (k == "inner_lr" and callable(v))}
            packed.append(values | {"params": [index[id(param)] for param in group["params"]]})
        return packed

    def extra_state_dict(self) -> dict[str, Any]:
        """The measurements of the gain and of `inner_lr="noise"`: plain numbers, alike on all ranks. Not collective.

        `state_dict()` has it; `torch.distributed.checkpoint` drops it, so save it beside that.
        """
        noise = self._rule.local_noise.state_dict()
        return ({"local_noise": noise} if noise else {}) | ({} if self._gain is None else self._gain.save())

    def load_extra_state_dict(self, extra: Mapping[str, Any]) -> None:
        """Continue from what `extra_state_dict()` has saved; call it on every rank, which the next step compares.

        Raises:
            UsageError: if it does not fit; nothing has changed then.
        """
        self._require_open()
        digest = self._checked_extra(extra)
        self._load_extra(extra)
        self._loaded_extra = digest or 1

    def _checked_extra(self, extra: Mapping[str, Any]) -> int:
        """A digest of what was measured, which must be alike on all ranks."""
        noise = extra.get("local_noise", {})
        if not isinstance(noise, Mapping) or not all(isinstance(value, float) for value in noise.values()):
            raise UsageError("the state's 'local_noise' is not what was saved")
        digest = hashlib.blake2b(repr(sorted(noise.items())).encode(), digest_size=8)
        gain = 0 if self._gain is None else self._gain.check(extra, len(self.param_groups))
        return (int.from_bytes(digest.digest(), "little") ^ gain) if noise or gain else 0

    def _load_extra(self, extra: Mapping[str, Any]) -> None:
        lacking = []
        if self._gain is not None:
            lacking += [] if self._gain.load(extra) else ["AdaScale's averages and progress stay as they are"]
        noise = extra.get("local_noise", {})
        if not noise and self._rule.follows_noise(self.param_groups):
            lacking.append("the noise for inner_lr='noise' is measured afresh")
        self._rule.local_noise.load(noise)
        if lacking:
            log.warning(
                "the loaded state has no %r entry for them: %s. load_extra_state_dict() brings them",
                KEY,
                "; ".join(lacking),
            )

    def local_state_dict(self) -> dict[str, Any]:
        """The part of the state that this rank updates: what all ranks save together is one copy of everything.

        Only the same number of workers on every rank can load it again; `state_dict()` is for any number. Not
        collective. Each entry of `state` has a `range` of its parameter's elements in the order of memory, and flat
        tensors of `master` and of the rule's state.

        Raises:
            UsageError: while state that was assigned or loaded waits for the next step.
        """
        self._members.require_same(self.param_groups)
        if self._live_state.digest or self._found_masters:
            raise UsageError(
                "local_state_dict() while assigned or loaded state waits for the next step: take it first"
            )
        state = {i: local_state_of(self._core, self._rule, i) for i in range(len(self._binding.params))}
        whole = {"state": state, "param_groups": self._packed_groups(), "place": self._place()}
        return whole | self.extra_state_dict()

    def _place(self) -> str:
        return f"rank {self.world.rank} of {self.world.size}, {self.world.workers} workers each"

    # -- Loading -------------------------------------------------------------------------------------------------

    def load_local_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective: take this rank's part from its `local_state_dict`; every rank brings its own.

        Raises:
            UsageError: on every rank, if one brings another rank's part, or one of other numbers of ranks or workers.
            MismatchError: on every rank, if the ranks bring parts of different times.
        """
        self._load(state_dict, local=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective: take hyper-parameters and state from a `state_dict`, and master weights if "extrapcomm" has them.

        Accepts torch.optim's of the same rule, too: that has no master weights, so the present ones stay, or those
        that an attached model has just loaded. A `state[i]["master"]` may be older than the model, because torch.optim
        keeps it untouched: the next step uses it if it rounds to the weights that are there, and else the model's.
        torch's hooks for loading run first and may change the whole dict.

        Raises:
            UsageError: on every rank, if it does not fit or if a hook fails on one; nothing is loaded then.
            MismatchError: on every rank, if the ranks bring different ones.
        """
        self._load(state_dict, local=False)

    def _load(self, state_dict: dict[str, Any], local: bool) -> None:
        self._require_open()
        found: Masters = {}
        try:
            self._require_outside("loading")
            self._members.require_same(self.param_groups)
            if not isinstance(state_dict, Mapping):
                raise UsageError(f"this is not an optimizer's state_dict but a {type(state_dict).__name__}")
            if not local:
                state_dict = self._after_loading_hooks(state_dict)
            if (place := state_dict.get("place") if local else self._place()) != self._place():
                raise UsageError(f"this state belongs to {place}, not to {self._place()}")
            groups = groups_of(state_dict, self.param_groups)
            for group, (flags, slots) in zip(groups, self._settled, strict=True):
                self._rule.check_fixed(group, flags, slots)
            if local:
                layers, digest = local_layers_of(state_dict, self._core, self._rule, self._entries.forms)
            else:
                layers, found = layers_of(state_dict, self._entries)
                if self._to_adopt:  # the weights that the model has loaded count
                    found |= {i: weights for i, (weights, *_) in enumerate(layers) if weights is not None}
                    layers = [(None, slots, updates) for _, slots, updates in layers]
                digest = digest_of(layers, list(found.values()))
            extra = state_dict if local else extra_of(state_dict)
            digest ^= self._checked_extra(extra)
            lacking = [i for i, (weights, *_) in enumerate(layers) if weights is None]
            if lacking and not self._to_adopt:
                self._binding.require_own_weights()
        except Exception as error:
            self._core.complain(describe(error))
            raise
        with self._binding.kept(lacking) if self._to_adopt else nullcontext():
            self._core.load(layers, digest)
        self._replace_groups(groups)
        self._load_extra(extra)
        self._live_state.forget()
        self._found_masters = found
        self._loaded_extra = 0
        if not lacking:
            self._binding.ownership.show_again()
        self._binding.mark_written()
        self._to_adopt = self._to_adopt and bool(lacking)
        if not local:
            for hook in self._optimizer_load_state_dict_post_hooks.values():
                hook(self)

    def _after_loading_hooks(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The dict that torch's hooks leave to load."""
        result = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, result)
            result = result if changed is None else changed
        return result

    def _replace_groups(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Give the groups their loaded values; the parameters stay."""
        loaded = []
        for group, saved in zip(self.param_groups, groups, strict=True):
            values = {key: copy.deepcopy(value) for key, value in saved.items() if key != "params"}
            loaded.append(values | {"params": group["params"]})
        self.__setstate__({"param_groups": loaded})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Collective once the optimizer exists: train these parameters, too. The others keep weights and state.

        Gradients, of all parameters, and counted micro-batches are forgotten.

        Args:
            param_group: `params` and, if they differ from the defaults, hyper-parameters.

        Raises:
            UsageError: on every rank, if the group cannot be; nothing has changed then.
        """
        if not self._built:
            super().add_param_group(param_group)
            return
        self._require_open()
        if self._to_adopt:
            self._adopt_pending()
        before = len(self.param_groups)
        error: Exception | None = None
        layers: list[Any] = []
        groups: list[Any] = []
        prints: list[Fingerprint] = []
        try:
            self._require_outside("add_param_group()")
            self._members.require_same(self.param_groups)
            self._binding.require_own_weights(everywhere=True)
            super().add_param_group(param_group)
            layers, groups = self._describe()
            prints = self._fingerprints(layers, before)
        except Exception as caught:
            error = caught
        try:
            self.world.agree(error, "parameter group")
            require_same_order(self.world, prints)
            core = self._make_core(layers, groups)
        except Error:
            del self.param_groups[before:]
            raise
        self._replace_core(core, layers, groups)
        hooks.attach_again(self)

    def _replace_core(self, core: Core, layers: list[Any], groups: list[Any]) -> None:
        saved = snapshot(self._core, len(self._binding.params))
        self._outcome = self._core.outcome
        self._switch(0)
        self._binding.forget_gradients()
        self._binding.remove_hooks()
        self._core.close()
        self._bind(core, layers, groups)
        restore(self._core, saved, len(self._binding.params))
        self._binding.mark_written()
