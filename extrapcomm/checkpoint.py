"""The engine's weights and state as torch.optim's dictionaries, and back; and the optimizer's methods for that."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from numpy.typing import NDArray

from . import _core
from .binding import strided
from .bound import FOREIGN_SWITCHES, BoundOptimizer
from .errors import Error, UsageError, describe
from .hyper import Rule
from .modes import outside_inference
from .order import Fingerprint, require_same_order

__all__ = ["Checkpoints"]

Core = _core.Engine
Layer = tuple[NDArray[Any] | None, list[NDArray[Any] | None], int]


def fill(packed: dict[str, Any], core: Core, rule: Rule, params: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Put weights and state into the dictionary that torch made of the groups."""
    packed["state"] = {i: _state_of(core, rule, i, param) for i, param in enumerate(params)}
    return packed


@outside_inference
def _state_of(core: Core, rule: Rule, i: int, param: torch.Tensor) -> dict[str, Any]:
    state = {"master": strided(core.read(i, 0), param)}
    if core.updates(i):
        state["step"] = torch.tensor(float(core.updates(i)), dtype=torch.float32, device="cpu")
        for slot, name in enumerate(rule.slots[: core.slots], 1):
            state[name] = strided(core.read(i, slot), param)
    return state


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
    if switches := [s for s in FOREIGN_SWITCHES if any(group.get(s) for group in saved)]:
        raise UsageError(f"the state_dict uses {', '.join(switches)}, which extrapcomm does not have")
    return [{**now, **then} for now, then in zip(current, saved, strict=True)]


def layers_of(
    state_dict: Mapping[str, Any], core: Core, rule: Rule, params: Sequence[torch.Tensor]
) -> tuple[list[Layer], int]:
    """What the engine loads, and a digest of it that must be alike on all ranks."""
    state = state_dict.get("state", {})
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    layers = [_layer(state.get(i, {}), core, rule, p) for i, p in zip(order, params, strict=True)]
    digest = hashlib.blake2b(digest_size=8)
    for weights, slots, updates in layers:
        digest.update(str(updates).encode())
        for array in (weights, *slots):
            digest.update(b"-" if array is None else array.data)
    return layers, int.from_bytes(digest.digest(), "little")


def _layer(entry: Mapping[str, Any], core: Core, rule: Rule, param: torch.Tensor) -> Layer:
    slots = [_flat(entry.get(name), param) for name in rule.slots[: core.slots]]
    counted = _count(entry["step"]) if "step" in entry else int(any(slot is not None for slot in slots))
    return _flat(entry.get("master"), param), slots, counted


def _flat(value: Any, param: torch.Tensor) -> NDArray[Any] | None:
    """A saved tensor in the master type and in the order of the parameter's memory."""
    if value is None:
        return None
    if tuple(value.shape) != tuple(param.shape):
        raise UsageError(
            f"the state_dict has a tensor of shape {tuple(value.shape)} for one of {tuple(param.shape)}"
        )
    flat = torch.empty(param.numel(), dtype=_master_type(param), device="cpu")
    flat.as_strided(param.shape, param.stride()).copy_(value)
    return flat.numpy()


@outside_inference
def local_state_of(core: Core, rule: Rule, i: int) -> dict[str, Any]:
    """The part of one parameter's weights and state that this rank updates."""
    begin, end = core.owned(i)
    names = ["master", *rule.slots[: core.slots]]
    parts = {name: torch.from_numpy(core.read(i, slot, (begin, end))) for slot, name in enumerate(names)}
    return {"range": (begin, end), "step": core.updates(i), **parts}


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
    for name in ("master", *rule.slots[: core.slots]):
        if name not in entry or entry[name].shape != (end - begin,):
            raise UsageError(f"this state has no {name!r} of {end - begin} elements for parameter {i}")
        array = torch.zeros(param.numel(), dtype=_master_type(param), device="cpu")
        array[begin:end] = entry[name]
        whole.append(array.numpy())
    return whole[0], list(whole[1:]), _count(entry["step"])


def _count(step: Any) -> int:
    if (count := int(step)) < 0:
        raise UsageError(f"a state's step must not be negative, but is {count}")
    return count


def _master_type(param: torch.Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


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
    slots = range(1, core.slots + 1)
    with collected(core):
        return [(core.read(i, 0), [core.read(i, s) for s in slots], core.updates(i)) for i in range(count)]


def restore(core: Core, saved: list[Layer], count: int) -> None:
    """Collective: give a snapshot to an engine of `count` layers; those that it does not have start afresh."""
    empty: list[NDArray[Any] | None] = [None] * core.slots
    layers: list[Layer] = [(weights, (slots + empty)[: core.slots], n) for weights, slots, n in saved]
    layers += [(None, list(empty), 0)] * (count - len(saved))
    core.load(layers, 0)


class Checkpoints(BoundOptimizer):
    """What an optimizer here saves, loads and takes in later."""

    _collected = False  # the state of all hosts can be read

    def state_dict(self, rank0_only: bool = False) -> dict[str, Any]:
        """torch.optim's dict of the same rule, with the master weights as `state[i]["master"]`.

        torch.optim's optimizer of the same name loads it. What a gain has measured is `["adascale"]`, what
        `inner_lr="noise"` has, `["local_noise"]`.
        Not collective on one host. Ranks on several hosts must all call it, because each has a part of the state.

        The displacements are not in it: after loading, every worker starts from the master weights. An `inner_lr` that
        is a function is left out.

        Args:
            rank0_only: the other ranks take part but get a dict without `state`: less memory and traffic.
        """
        packed = self._packed_groups()
        with self.collected_state(0 if rank0_only else None):
            if rank0_only and self.world.rank > 0:
                return packed | self._saved_gain()
            return fill(packed, self._core, self._rule, self._binding.params) | self._saved_gain()

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

    def _packed_groups(self) -> dict[str, Any]:
        packed = super().state_dict()
        for group in packed["param_groups"]:
            if callable(group["inner_lr"]):
                del group["inner_lr"]
        return packed

    def local_state_dict(self) -> dict[str, Any]:
        """The part of the state that this rank updates: what all ranks save together is one copy of everything.

        Only the same number of workers on every rank can load it again; `state_dict()` is for any number. Not
        collective. Each entry of `state` has a `range` of its parameter's elements in the order of memory, and flat
        tensors of `master` and of the rule's state.
        """
        packed = self._packed_groups()
        state = {i: local_state_of(self._core, self._rule, i) for i in range(len(self._binding.params))}
        whole = {"state": state, "param_groups": packed["param_groups"], "place": self._place()}
        return whole | self._saved_gain()

    def _saved_gain(self) -> dict[str, Any]:
        noise = self._rule.local_noise.state_dict()
        return ({"local_noise": noise} if noise else {}) | ({} if self._gain is None else self._gain.save())

    def load_local_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective: take this rank's part from its `local_state_dict`; every rank brings its own.

        Raises:
            UsageError: on every rank, if one brings another rank's part, or one of other numbers of ranks or workers.
            MismatchError: on every rank, if the ranks bring parts of different times.
        """
        self._load(state_dict, local=True)

    def _place(self) -> str:
        return f"rank {self.world.rank} of {self.world.size}, {self.world.workers} workers each"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective: take hyper-parameters, state, and master weights if they are there, from a `state_dict`.

        Accepts torch.optim's of the same rule, too: that has no master weights, so the present ones stay, or those
        that an attached model has just loaded.

        Raises:
            UsageError: on every rank, if it does not fit.
            MismatchError: on every rank, if the ranks bring different ones.
        """
        self._load(state_dict, local=False)

    def _load(self, state_dict: dict[str, Any], local: bool) -> None:
        self._require_open()
        try:
            if self._showing:
                raise UsageError("loading inside master_weights(): leave the context first")
            if (place := state_dict.get("place") if local else self._place()) != self._place():
                raise UsageError(f"this state belongs to {place}, not to {self._place()}")
            groups = groups_of(state_dict, self.param_groups)
            for group, (flags, slots) in zip(groups, self._settled, strict=True):
                self._rule.check_fixed(group, flags, slots)
            read = local_layers_of if local else layers_of
            layers, digest = read(state_dict, self._core, self._rule, self._binding.params)
            if self._gain is not None:
                digest ^= self._gain.check(state_dict, len(groups))
            lacking = [i for i, (weights, *_) in enumerate(layers) if weights is None]
            if lacking and not self._to_adopt:
                self._binding.require_own_weights()
        except Exception as error:
            self._core.complain(describe(error))
            raise
        with self._binding.kept(lacking) if self._to_adopt else nullcontext():
            self._core.load(layers, digest)
        super().load_state_dict({"state": {}, "param_groups": groups})
        if self._gain is not None:
            self._gain.load(state_dict)
        self._rule.local_noise.load(state_dict.get("local_noise", {}))
        self._binding.mark_written()
        self._to_adopt = self._to_adopt and bool(lacking)

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
            self.adopt()
        before = len(self.param_groups)
        error: Exception | None = None
        layers: list[Any] = []
        groups: list[Any] = []
        prints: list[Fingerprint] = []
        try:
            if self._showing:
                raise UsageError("add_param_group() inside master_weights(): leave the context first")
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
