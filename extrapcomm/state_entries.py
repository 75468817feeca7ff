"""One parameter's rule state as the dictionary that torch.optim uses, and back to the arrays that the engine loads."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from . import _core
from .binding import Binding, strided
from .errors import UsageError
from .hyper import Rule
from .modes import outside_inference

__all__ = [
    "MASTER",
    "Layer",
    "StateEntries",
    "digest_of",
    "digest_of_numbers",
    "flat_master",
    "has_only_counts",
    "has_own_master",
    "is_nothing",
    "step_count",
]

# Weights or None (they stay), the slots (None: zeros), and the number of updates. `KEPT_STATE` in place of the last two
# leaves the state as it is.
Layer = tuple[NDArray[Any] | None, list[NDArray[Any] | None], int]
KEPT_STATE: tuple[list[NDArray[Any] | None], int] = ([], -1)

MASTER = "master"


def has_own_master(param: torch.Tensor) -> bool:
    """Returns true if the parameter's type cannot hold its master weights: bfloat16 and float16."""
    return param.dtype != _master_type(param)


def has_only_counts(core: "_core.Engine", i: int) -> bool:
    """Return true if an engine's parameter i was updated, but with a momentum of zero, so that it has no state yet."""
    return core.updates(i) > 0 and not core.begun(i)


def is_nothing(value: Any) -> bool:
    """Returns true if a saved dictionary has nothing under a key.

    `torch.distributed.checkpoint` writes an empty dictionary where a flattened checkpoint lacks a key.
    """
    return value is None or (isinstance(value, Mapping) and not value)


class StateEntries:
    """The rule state of an engine's parameters, read and written under torch.optim's names.

    Args:
        core: the engine.
        rule: its rule.
        binding: has the parameters in the engine's order, their names and their forms there.
    """

    def __init__(self, core: "_core.Engine", rule: Rule, binding: Binding) -> None:
        self._core = core
        self._rule = rule.name
        self._slots = list(rule.slots[: core.slots])
        self._known = {"step", MASTER, *rule.slots}
        self._names = binding.names
        self.forms = binding.ownership.forms
        self.params = binding.params
        self.index = {id(param): i for i, param in enumerate(self.params)}

    def keys(self, i: int) -> list[str]:
        """The keys of parameter i's entry; 16-bit parameters have their float32 master weights in it."""
        return ["step", *self._slots, *([MASTER] if has_own_master(self.forms[i]) else [])]

    @outside_inference
    def read(self, i: int, key: str) -> torch.Tensor:
        """A copy of one value: the number of updates, a slot, or the master weights."""
        if key == "step":
            return torch.tensor(float(self._core.updates(i)), dtype=torch.float32, device="cpu")
        slot = 0 if key == MASTER else 1 + self._slots.index(key)
        return strided(self._core.read(i, slot), self.forms[i])

    @outside_inference
    def fresh(self, i: int, key: str) -> torch.Tensor:
        """The value that a parameter without any update has."""
        if key == "step":
            return torch.tensor(0.0, dtype=torch.float32, device="cpu")
        return torch.zeros_like(self.forms[i], dtype=_master_type(self.forms[i]), device="cpu")

    def updates(self, i: int) -> int:
        """The number of parameter i's updates, if one of them has put something into its state."""
        return 0 if self.only_counts(i) else self._core.updates(i)

    def only_counts(self, i: int) -> bool:
        """Return true if parameter i was updated, but with a momentum of zero, so that its state has not begun."""
        return has_only_counts(self._core, i)

    def layer(self, i: int, entry: Mapping[str, Any]) -> Layer:
        """The arrays that the engine loads for an entry without master weights.

        Raises:
            UsageError: if the entry is of another rule or incomplete, or if a value has another shape or is no tensor
                or number.
        """
        self._require_fitting(i, {key for key, value in entry.items() if not is_nothing(value)})
        slots = [flat_master(entry.get(name), self.forms[i]) for name in self._slots]
        there = any(slot is not None for slot in slots)
        if is_nothing(step := entry.get("step")):
            return None, slots, int(there)
        count = step_count(step)
        if self._slots and not there:
            return None, slots, count  # the engine begins the momentum at the next step
        begun = len(self._slots) == 1 and slots[0] is not None and slots[0].any()  # and with one it is not
        return None, slots, max(count, int(begun))

    def begins_by(self, key: str) -> bool:
        """Return true for the only slot of a rule whose first step puts the gradient there."""
        return self._slots == [key]

    def _require_fitting(self, i: int, keys: set[str]) -> None:
        """Complain about an entry of another rule, or with something missing; one without any values is a fresh start.

        torch's SGD and its kin keep nothing but a momentum buffer, and that only once there is momentum.
        """
        place = f"the state of parameter {self._names[i]!r}"
        if unknown := sorted(keys - self._known):
            raise UsageError(
                f"{place} has {unknown[0]!r}, which rule {self._rule!r} does not know: it has "
                f"{', '.join(['step', *self._slots])}. Is the state another optimizer's?"
            )
        needed = {"step", *self._slots} if len(self._slots) > 1 else set()
        if (lacking := sorted(needed - keys)) and keys & {"step", *self._slots}:
            raise UsageError(f"{place} has no {lacking[0]!r}, which rule {self._rule!r} needs")


@outside_inference
def flat_master(value: Any, param: torch.Tensor) -> NDArray[Any] | None:
    """A saved tensor in the master type and in the order of the parameter's memory; None if there is none.

    Raises:
        UsageError: if it is no tensor of the parameter's shape.
    """
    if is_nothing(value):
        return None
    if not isinstance(value, torch.Tensor) or value.is_sparse or value.is_complex():
        raise UsageError(f"the optimizer's state holds {type(value).__name__} where a dense tensor belongs")
    if tuple(value.shape) != tuple(param.shape):
        raise UsageError(
            f"the state_dict has a tensor of shape {tuple(value.shape)} for one of {tuple(param.shape)}"
        )
    flat = torch.empty(param.numel(), dtype=_master_type(param), device="cpu")
    flat.as_strided(param.shape, param.stride()).copy_(value.detach())
    return flat.numpy()


def step_count(step: Any) -> int:
    """A saved number of updates.

    Raises:
        UsageError: if it is none.
    """
    try:
        if isinstance(step, (str, bytes, bool)) or int(step) != float(step):
            raise ValueError("not a whole number")
        count = int(step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UsageError(f"a state's step must be a whole number, not {step!r}") from None
    if count < 0:
        raise UsageError(f"a state's step must not be negative, but is {count}")
    return count


def digest_of(layers: Sequence[Layer], more: Sequence[Any] = ()) -> int:
    """A 64-bit digest of the arrays and numbers that the engine loads, and of further arrays, for comparing ranks."""
    digest = hashlib.blake2b(digest_size=8)
    for weights, slots, updates in layers:
        digest.update(str(updates).encode())
        for array in (weights, *slots):
            digest.update(b"-" if array is None else array.data)
    for array in more:
        digest.update(b"-" if array is None else array.data)
    return int.from_bytes(digest.digest(), "little")


def digest_of_numbers(numbers: Iterable[int]) -> int:
    """A 64-bit digest of a set of whole numbers, for comparing ranks."""
    digest = hashlib.blake2b(repr(sorted(numbers)).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _master_type(param: torch.Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32
