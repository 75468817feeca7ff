"""`optimizer.state`: the rule's state as a mapping that reads from the engine, and stages what is written into it.

Reading a value copies it out of the shards. Writing stages the value: the ranks compare what they have staged when the
next step begins, and apply it there. The keys are known without any communication.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from .errors import UsageError
from .modes import outside_inference
from .odd_gradients import is_shared
from .state_entries import MASTER, Layer, StateEntries, digest_of, digest_of_numbers, is_nothing

__all__ = ["LiveState", "StateEntry"]

Source = Callable[[], StateEntries]


class _HandedOut:
    """A copy that a user has, watched for in-place writes.

    A detached alias shares the version counter, with the copy and with all views of it. It stays as long as anybody has
    one of them.
    """

    def __init__(self, tensor: torch.Tensor, place: tuple[int, str], name: str, of_nothing: bool) -> None:
        self.place = place  # the parameter's number, and the key
        self.of_nothing = of_nothing  # it was read where there was no state
        self.name = name
        self.tensor = weakref.ref(tensor)
        self._alias = tensor.detach()
        self._version = tensor._version
        self._replaced = False

    def assigned(self) -> None:
        """Forget the writes until now: they have been staged."""
        self._version = self._alias._version
        self._replaced = False

    def replaced(self) -> None:
        """Another value has been staged for it, so it is no state any more."""
        self._replaced = True

    @property
    def alive(self) -> bool:
        """True if somebody still has the copy, or a view of it."""
        return self.tensor() is not None or is_shared(self._alias)

    @property
    def written(self) -> bool:
        """True if somebody wrote into the copy."""
        return not self._replaced and self._alias._version != self._version


class LiveState(MutableMapping[torch.Tensor, Any]):
    """One entry for each parameter of the optimizer.

    Args:
        entries: gives the engine's present state; the engine may be replaced.
        require_readable: raises UsageError where values cannot be read without other ranks.
        require_writable: raises UsageError where nothing can be staged.
        name: gives the name of parameter i, for errors.
    """

    def __init__(
        self,
        entries: Source,
        require_readable: Callable[[], None],
        require_writable: Callable[[], None],
        name: Callable[[int], str],
    ) -> None:
        self._entries = entries
        self._require_readable = require_readable
        self._require_writable = require_writable
        self._name = name
        self._staged: dict[int, dict[str, Any]] = {}
        self._looks: weakref.WeakValueDictionary[int, StateEntry] = (
            weakref.WeakValueDictionary()
        )  # that users have
        self._handed_out: list[_HandedOut] = []

    # -- The mapping ---------------------------------------------------------------------------------------------

    def __getitem__(self, param: torch.Tensor) -> "StateEntry":
        i = self._index(param)
        entry = self._looks.get(i)
        if entry is None:
            entry = self._looks[i] = StateEntry(self, i)
        return entry

    def __setitem__(self, param: torch.Tensor, entry: Mapping[str, Any]) -> None:
        i = self._index(param)
        self._require_writable()
        if isinstance(entry, StateEntry) and entry.belongs_to(self, i):
            return
        self._stage(i, self._without_master(i, entry))
        if isinstance(entry, StateEntry) and entry.come_back(self, i):
            self._looks[i] = entry

    def _without_master(self, i: int, entry: Any) -> dict[str, Any]:
        """Return an entry without master weights, which are no part of the rule's state."""
        if not isinstance(entry, Mapping):
            raise UsageError(f"a parameter's state must be a mapping, not {type(entry).__name__}")
        return {key: value for key, value in entry.items() if not self._is_present_master(i, key, value)}

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Stage the entries of a mapping, or of pairs: all of them, or none if one does not fit."""
        given = dict(*args, **kwargs)
        for param, entry in given.items():
            i = self._index(param)
            self._require_fitting(i, self._without_master(i, entry))
        for param, entry in given.items():
            self[param] = entry

    def __delitem__(self, param: torch.Tensor) -> None:
        i = self._index(param)
        self._require_writable()
        self._stage(i, {})

    def pop(self, param: torch.Tensor, *default: Any) -> Any:
        """The entry as a dictionary of copies; the parameter starts afresh."""
        if param not in self and default:
            return default[0]
        i = self._index(param)
        self._require_readable()
        entry = {key: self.read(i, key) for key in self.keys_of(i) if key != MASTER}
        del self[param]
        return entry

    def __ior__(self, other: Any) -> "LiveState":
        self.update(other)
        return self

    def popitem(self) -> Any:
        """Refuse: every parameter keeps its entry."""
        raise UsageError("opt.state keeps an entry for each parameter: use clear(), or delete them by name")

    def start_afresh(self, i: int) -> None:
        """Stage a fresh start for parameter i, in the entries that a user has as well."""
        self._require_writable()
        self._stage(i, {}, replaced=self.keys_of(i))

    def clear(self) -> None:
        """Stage a fresh start for every parameter."""
        self._require_writable()
        for i in range(len(self)):
            self._stage(i, {})

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(list(self._entries().params))

    def __len__(self) -> int:
        return len(self._entries().params)

    def __contains__(self, param: object) -> bool:
        return id(param) in self._entries().index

    def __repr__(self) -> str:
        return f"<state of {len(self)} parameters>"

    def plain(self) -> dict[torch.Tensor, dict[str, Any]]:
        """All entries as dictionaries of copies, which nobody watches."""
        self._require_readable()
        return {param: {key: self.read(i, key) for key in self.keys_of(i)} for i, param in enumerate(self)}

    def __reduce__(self) -> Any:
        return dict, (self.plain(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.plain(), memo)

    def __copy__(self) -> Any:
        return self.plain()

    def copy(self) -> Any:
        """As `dict.copy()`: all entries as dictionaries of copies."""
        return self.plain()

    def __eq__(self, other: object) -> bool:
        return self is other  # values are tensors, which have no truth

    __hash__ = None  # type: ignore[assignment]

    def replace(self, state: Any) -> None:
        """Stage another state for all parameters: those that `state` lacks start afresh.

        Raises:
            UsageError: if it is no mapping of this optimizer's parameters.
        """
        if state is self:
            return
        if not isinstance(state, Mapping):
            raise UsageError(f"an optimizer's state must be a mapping, not {type(state).__name__}")
        given = {self._index(param): entry for param, entry in state.items()}
        for i, entry in given.items():  # all of them first, or a half would be staged
            self._require_fitting(i, self._without_master(i, entry))
        for i, param in enumerate(self):
            if i in given:
                self[param] = given[i]
            else:
                del self[param]

    def _index(self, param: Any) -> int:
        if id(param) not in self._entries().index:
            raise KeyError("this tensor is no parameter of the optimizer")
        return self._entries().index[id(param)]

    # -- Values --------------------------------------------------------------------------------------------------

    def keys_of(self, i: int) -> list[str]:
        """The keys of parameter i's entry, whether it was updated or not."""
        return self._entries().keys(i)

    def value(self, i: int, key: str) -> Any:
        """A copy of a value, as staged or as the engine has it; writes into the copy are noticed."""
        self._require_readable()
        tensor = self.read(i, key)
        self._handed_out = [out for out in self._handed_out if out.alive or out.written]
        self.watch(i, key, tensor)
        return tensor

    @outside_inference
    def read(self, i: int, key: str) -> torch.Tensor:
        """A copy of a value, as staged or as the engine has it."""
        if i in self._staged and key != MASTER:
            value = self._staged[i].get(key)
            return self._entries().fresh(i, key) if value is None else value.clone()
        return self._entries().read(i, key)

    def updated(self, i: int) -> bool:
        """Return true if parameter i has been updated, or will have been when what is staged is applied."""
        if i in self._staged:
            _, slots, updates = self._entries().layer(i, self._staged[i])
            return updates > 0 and (not slots or any(slot is not None for slot in slots))
        return self._entries().updates(i) > 0

    def only_counts(self, i: int) -> bool:
        """Return true if parameter i has been updated, but has no state yet."""
        return i not in self._staged and self._entries().only_counts(i)

    def has_state(self, i: int) -> bool:
        """Return true if parameter i has been updated or given something else than a fresh parameter has."""
        if self.updated(i):
            return True
        slots = [key for key in self.keys_of(i) if key not in ("step", MASTER)]
        return any(bool(self.read(i, key).any()) for key in slots)

    def put(self, i: int, key: str, value: Any) -> None:
        """Stage one value; the others of the parameter stay."""
        self._require_writable()
        if key not in self.keys_of(i):
            raise UsageError(f"the rule's state has no {key!r}; it has {', '.join(self.keys_of(i))}")
        if self._is_present_master(i, key, value):
            return
        self._require_readable()
        if self._is_there(i, key, value):
            return
        begins = self._entries().begins_by(key) and not self.updated(
            i
        )  # then a count of 0 would hide the value
        without = (key, MASTER, "step") if begins else (key, MASTER)
        others = {name: self.read(i, name) for name in self.keys_of(i) if name not in without}
        self._stage(i, others | {key: value}, replaced=[key])

    def _is_there(self, i: int, key: str, value: Any) -> bool:
        """Return true for a value that changes nothing: trainers move states to and fro."""
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return False
        if any(out.written for out in self._handed_out if out.tensor() is value):
            return False
        if self._entries().begins_by(key) and not self.updated(i):
            # A buffer of zeros is more than none, unless it is what was read here in place of none.
            return any(out.tensor() is value and out.of_nothing for out in self._handed_out)
        here = self.read(i, key)
        return (
            value.shape == here.shape
            and value.dtype == here.dtype
            and bool(torch.equal(value.to(here), here))
        )

    def drop(self, i: int, key: str) -> None:
        """Stage one value as if it had never been: torch's rules then begin with the next gradient, or with zeros."""
        if key not in self.keys_of(i):
            raise KeyError(key)
        self.put(i, key, None if self._entries().begins_by(key) else self._entries().fresh(i, key))

    def _is_present_master(self, i: int, key: str, value: Any) -> bool:
        """Returns true for the master weights that are there already; they are not part of the rule's state."""
        if key != MASTER:
            return False
        here = self._entries().read(i, MASTER)
        if (
            isinstance(value, torch.Tensor)
            and value.shape == here.shape
            and torch.equal(value.to(here), here)
        ):
            return True
        raise UsageError(
            "master weights are not changed through opt.state: change the parameters in master_weights(write=True)"
        )

    # -- Staging -------------------------------------------------------------------------------------------------

    def _require_fitting(self, i: int, entry: Mapping[str, Any]) -> int:
        """The number of updates that an entry stands for; UsageError if it does not fit."""
        unknown = [key for key in entry if key not in self.keys_of(i)]
        if unknown:
            raise UsageError(f"the rule's state has no {unknown[0]!r}; it has {', '.join(self.keys_of(i))}")
        return self._entries().layer(i, entry)[2]

    def watch(self, i: int, key: str, tensor: Any) -> None:
        """Notice writes into a tensor that stands for a value."""
        if isinstance(tensor, torch.Tensor):
            self._handed_out.append(
                _HandedOut(tensor, (i, key), f"state[{self._name(i)}][{key!r}]", not self.updated(i))
            )

    def is_readable(self) -> bool:
        """Return true if values can be read without other ranks."""
        try:
            self._require_readable()
        except UsageError:
            return False
        return True

    @outside_inference
    def _stage(self, i: int, entry: Mapping[str, Any], replaced: Sequence[str] | None = None) -> None:
        """Stage an entry. It takes the place of the one that is there, which goes on with who has it, unless only some
        values are `replaced`. Copies of what is replaced are no state any more, so they may be written.
        """
        updates = self._require_fitting(i, entry)
        own: dict[str, Any] = {key: value for key, value in entry.items() if not is_nothing(value)}
        own.update(
            {key: value.detach().clone() for key, value in own.items() if isinstance(value, torch.Tensor)}
        )
        if own and not isinstance(count := own.get("step", updates), torch.Tensor):
            own["step"] = torch.tensor(float(count), dtype=torch.float32, device="cpu")
        if replaced is None and (look := self._looks.pop(i, None)) is not None:
            look.part()
        self._staged[i] = own
        values = {id(value) for value in entry.values() if value is not None}
        places = {(i, key) for key in (self.keys_of(i) if replaced is None else replaced)}
        for out in self._handed_out:
            if id(out.tensor()) in values:  # as after opt.state[p][key] *= 2
                out.assigned()
            elif out.place in places:
                out.replaced()

    @property
    def digest(self) -> int:
        """A number that is alike on all ranks if they have staged the same; 0 if nothing is staged."""
        if not self._staged:
            return 0
        return (digest_of(self._staged_layers()) ^ digest_of_numbers(self._staged)) or 1

    def _staged_layers(self) -> list[Layer]:
        return [self._entries().layer(i, self._staged[i]) for i in sorted(self._staged)]

    def layers(self) -> dict[int, Layer]:
        """The layers that are staged, by the parameter's number."""
        return dict(zip(sorted(self._staged), self._staged_layers(), strict=True))

    def applied(self) -> None:
        """The engine has what was staged."""
        self._staged = {}

    def forget(self) -> None:
        """All state is another: forget what is staged and which copies are out."""
        self._staged = {}
        self._handed_out = []

    def require_unwritten(self) -> None:
        """Complain if somebody wrote into a copy.

        Raises:
            UsageError: it names the copy; the next call does not know of it any more.
        """
        written = next((out.name for out in self._handed_out if out.written), None)
        self._handed_out = [out for out in self._handed_out if out.alive and not out.written]
        if written is not None:
            raise UsageError(
                f"opt.{written} was written in place, but it is a copy: assign it (opt.state[p][key] = value) on every "
                "rank, and the next step takes it"
            )


class StateEntry(MutableMapping[str, Any]):
    """One parameter's state: `step`, the rule's slots, and for 16-bit parameters `master`.

    Libraries that rebuild a mapping of this type from its items get a plain dictionary.
    """

    def __new__(cls, state: Any, i: int | None = None) -> Any:
        """An entry of a `LiveState`, or a plain dictionary of one mapping's items."""
        return dict(state) if i is None else super().__new__(cls)

    def __init__(self, state: LiveState, i: int) -> None:
        self._state = state
        self._i = i
        self._apart: dict[str, Any] | None = None  # its values, once another entry has taken its place
        self._lost = False  # its values could not be read then

    def belongs_to(self, state: LiveState, i: int) -> bool:
        """Returns true if this is parameter i's entry of that state."""
        return self._state is state and self._i == i and self._apart is None

    def part(self) -> None:
        """Another entry takes the place of this one, which keeps its values where they can be read."""
        self._lost = not self._state.is_readable()
        keys = [] if self._lost else [key for key in self if key != MASTER]
        self._apart = {key: self._state.read(self._i, key) for key in keys}

    def come_back(self, state: LiveState, i: int) -> bool:
        """This entry has been assigned: true if it is parameter i's again, as it was before."""
        if self._state is not state or self._i != i:
            return False
        for key, value in (self._apart or {}).items():
            state.watch(i, key, value)
        self._apart = None
        return True

    def __getitem__(self, key: str) -> Any:
        if self._lost:
            raise UsageError(
                "this entry was taken out of opt.state, and another host has a part of its values: take it out inside "
                "collected_state()"
            )
        if self._apart is not None:
            return self._apart[key]
        if key not in self._state.keys_of(self._i):
            raise KeyError(key)
        return self._state.value(self._i, key)

    def __setitem__(self, key: str, value: Any) -> None:
        if self._apart is not None:
            self._apart[key] = value
        else:
            self._state.put(self._i, key, value)

    def __delitem__(self, key: str) -> None:
        if self._apart is not None:
            del self._apart[key]
        else:
            self._state.drop(self._i, key)

    def clear(self) -> None:
        """Stage a fresh start for the parameter. The keys stay, so the inherited loop would never end."""
        if self._apart is not None:
            self._apart.clear()
            return
        self._state.start_afresh(self._i)

    def popitem(self) -> Any:
        """Refuse: the keys of a state stay."""
        raise UsageError("opt.state keeps its keys: use clear(), or delete the entries by name")

    def __ior__(self, other: Any) -> "StateEntry":
        self.update(other)
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    @property
    def _keys(self) -> list[str]:
        return self._state.keys_of(self._i) if self._apart is None or self._lost else list(self._apart)

    def __repr__(self) -> str:
        return f"<state: {', '.join(self)}>"

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return dict(self)

    def __copy__(self) -> dict[str, Any]:
        return dict(self)
