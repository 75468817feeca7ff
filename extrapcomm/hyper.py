"""Hyper-parameters: from the names users know to the numbers that the engine takes, checked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import is_, itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import UsageError
from .local_noise import LocalNoise
from .switches import refuse_switches

__all__ = [
    "Extrapolation",
    "InnerRate",
    "Rule",
    "check_bucket",
    "check_choice",
    "check_max_norm",
    "check_tile",
]

InnerRate = float | str | Callable[[float], float]

INNER_PRESETS = ("lr", "lr/K", "noise")
RANDOM = ("gaussian", "uniform", "filter")
DISPLACEMENTS = ("preconditioned", "raw")

# Values that do not change without being replaced.
PLAIN = (float, int, str)

# A number that is smaller than this part of the largest value that it has had counts as zero: schedules that end at
# zero end at something like -2e-18, and not at the same on all ranks.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Extrapolation:
    """What displaces the weights between steps, beside each group's inner learning rate.

    Attributes:
        name: one of `_core.extrapolations()`.
        displacement: "preconditioned" measures gradients in units of the rule's steps, "raw" in their own.
        inner_clip: whether a gradient that displaces is clipped as the step is.
        noise: scale of random displacements.
        seed: of random displacements, alike on all ranks.

    Raises:
        UsageError: for values that cannot be.
    """

    name: str
    displacement: str = "preconditioned"
    inner_clip: bool = True
    noise: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in _core.extrapolations():
            raise UsageError(
                f"there is no extrapolation {self.name!r}; there are {', '.join(_core.extrapolations())}"
            )
        check_choice("displacement", self.displacement, DISPLACEMENTS)
        _number("noise", self.noise)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be a whole number from 0 to 2**64 - 1, not {self.seed!r}")

    def rate(self, inner: float) -> float:
        """What a direction is multiplied with."""
        return inner * self.noise if self.name in RANDOM else inner

    def for_core(self) -> tuple[str, bool, bool, int]:
        """As the engine takes it."""
        return self.name, self.displacement == "preconditioned", bool(self.inner_clip), self.seed


class Rule:
    """One of the library's rules with its list of hyper-parameters; `betas` stands for beta1, beta2, ..."""

    def __init__(self, name: str, extrapolation: Extrapolation, workers: int) -> None:
        rules = _core.rules()
        if name not in rules:
            raise UsageError(f"there is no rule {name!r}; there are {', '.join(sorted(rules))}")
        self.name = name
        self.extrapolation = extrapolation
        self.parameters: dict[str, float] = rules[name]["parameters"]
        self.flags: list[str] = rules[name]["flags"]
        self.fixed = [*self.flags, "maximize"]
        self.slots: list[str] = rules[name]["slots"]
        self.measures: int = rules[name]["measures"]
        self.revises: bool = rules[name]["revises"]
        self.local_noise = LocalNoise(workers)
        self._largest: list[
            list[float]
        ] = []  # for each group, the largest magnitude that each number has had
        self._latest: list[list[float]] = []  # for each group, the numbers of the last table
        self._table: NDArray[np.float64] | None = None
        # For each group, the values that its numbers came from, where those cannot have changed unseen.
        self._origins: list[tuple[Any, ...] | None] = []
        self._values_of = itemgetter(*self.presets(), "inner_lr")
        self._taken: list[list[float]] = []  # for each group, the numbers of the last step
        self.projects: bool = rules[name]["projects"]
        scaled = rules[name]["factor"] and extrapolation.displacement == "preconditioned"
        self.has_stages_of_its_own = extrapolation.name == "none" or (
            not scaled and extrapolation.name not in RANDOM
        )

    def presets(self) -> dict[str, Any]:
        """The rule's own values, under the names that users know."""
        values: dict[str, Any] = {n: v for n, v in self.parameters.items() if not n.startswith("beta")}
        betas = tuple(v for n, v in self.parameters.items() if n.startswith("beta"))
        return values | ({"betas": betas} if betas else {}) | dict.fromkeys(self.fixed, False)

    def flag_bits(self, group: Mapping[str, Any]) -> int:
        """Everything about a group that is settled when the engine is built: its flags, then `maximize`."""
        bits = 0
        for i, flag in enumerate(self.fixed):
            if _value(group, flag):
                bits |= 1 << i
        return bits

    def for_core(self, group: Mapping[str, Any], workers: int, place: int) -> tuple[int, list[float], bool]:
        """A group as the engine takes it: its flags, its numbers, and whether it maximizes.

        Raises:
            UsageError: for values that are not numbers, not finite or out of range, and for switches of torch's rules
                that this one does not have.
        """
        refuse_switches(group, self.name, self.flags)
        flags = self.flag_bits(group) & ((1 << len(self.flags)) - 1)
        return flags, self.numbers(group, workers, place)[:-1], bool(_value(group, "maximize"))

    def numbers(self, group: Mapping[str, Any], workers: int, place: int) -> list[float]:
        """A group's hyper-parameters in the engine's order, then the inner learning rate.

        Args:
            group: their names and values. Those that are negligible beside what they have been count as zero.
            workers: K.
            place: which group this is.

        Raises:
            UsageError: for values that are not numbers, not finite or out of range.
        """
        *sizes, inner_size = self._largest_of(place)
        numbers = [
            _checked(name, _settled(_finite(name, _value(group, name)), size))
            for name, size in zip(self.parameters, sizes, strict=True)
        ]
        self._check_momentum(group, place)
        inner = self._inner_rate(_value(group, "inner_lr"), numbers[0], workers, inner_size)
        return [*numbers, inner]

    def took(self) -> None:
        """The last table is in force, by a step or before the first one; later numbers are compared with it."""
        if self._latest == self._taken:
            return
        self._taken = self._latest
        self._largest += [self._largest_of(place) for place in range(len(self._largest), len(self._latest))]
        for row, largest in zip(self._latest, self._largest, strict=True):
            for i, number in enumerate(row):
                if not -largest[i] <= number <= largest[i]:
                    largest[i] = abs(number)
        if self.revises:  # a scale that the rule changes by itself may become as small as it likes
            for sizes in self._largest:
                sizes[list(self.parameters).index("scale")] = 0.0

    def _largest_of(self, place: int) -> list[float]:
        return self._largest[place] if place < len(self._largest) else [0.0] * (len(self.parameters) + 1)

    def _check_momentum(self, group: Mapping[str, Any], place: int) -> None:
        if "momentum" not in self.parameters:
            return
        first = place >= len(self._taken)  # torch.optim.SGD, too, asks for it at the beginning only
        if first and group.get("nesterov") and not (group["momentum"] > 0 and group["dampening"] == 0):
            raise UsageError("Nesterov momentum requires a momentum and zero dampening")
        if self.projects and group["momentum"] >= 1:
            raise UsageError(
                f"momentum must be below 1, but is {group['momentum']:g}: rule {self.name!r} divides its weight decay "
                "by 1 - momentum"
            )

    def _inner_rate(self, inner: InnerRate, lr: float, workers: int, largest: float) -> float:
        if isinstance(inner, str) and inner not in INNER_PRESETS:
            raise UsageError(
                f"inner_lr must be a number, a function of lr, 'lr', 'lr/K' or 'noise', not {inner!r}"
            )
        if inner == "noise" and workers < 2:
            raise UsageError(
                "inner_lr='noise' compares the workers' gradients, so it needs at least two workers"
            )
        if self.extrapolation.name == "none":
            return 0.0
        if isinstance(inner, str):
            own = {"lr": lr, "lr/K": lr / workers, "noise": lr * self.local_noise.coefficient}
            return self.extrapolation.rate(own[inner])
        number = _finite("inner_lr", inner(lr) if callable(inner) else inner)
        rate = _settled(self.extrapolation.rate(number), largest)
        return self.extrapolation.rate(_checked("inner_lr", number)) if rate else 0.0

    def follows_noise(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether an inner rate of theirs goes by the workers' noise, which then must be measured."""
        return self.extrapolation.name != "none" and any(
            isinstance(inner := group.get("inner_lr"), str) and inner == "noise" for group in groups
        )

    def table(self, groups: Sequence[Mapping[str, Any]], workers: int) -> NDArray[np.float64]:
        """All groups' numbers in one array, which nobody writes: it serves again while nothing changes."""
        if self._table is not None and self._are_as_before(groups):
            return self._table
        self._table = None
        self._latest = [self.numbers(group, workers, place) for place, group in enumerate(groups)]
        self._origins = [self._origin(group) for group in groups]
        self._table = np.array([number for row in self._latest for number in row], dtype=np.float64)
        return self._table

    def _are_as_before(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Returns true if each group has the values of the last table."""
        if len(groups) != len(self._origins):
            return False
        try:
            return all(
                origin is not None and _are_same(self._values_of(group), origin)
                for group, origin in zip(groups, self._origins, strict=True)
            )
        except Exception:  # a value is missing, or is an array that has no truth
            return False

    def _origin(self, group: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """A group's values, if all of them are what they say: no tensors, no functions, no preset that is measured."""
        values: tuple[Any, ...] = self._values_of(group)
        plain = all(isinstance(value, PLAIN) for value in values if not isinstance(value, tuple))
        pairs = all(isinstance(part, PLAIN) for value in values if isinstance(value, tuple) for part in value)
        return values if plain and pairs and group["inner_lr"] != "noise" else None

    def with_gains(
        self,
        table: NDArray[np.float64],
        groups: Sequence[Mapping[str, Any]],
        gains: Sequence[float],
        workers: int,
    ) -> NDArray[np.float64]:
        """The table with multiplied learning rates, and with the inner rates that follow from them."""
        rows = np.array(table).reshape(len(groups), -1)
        for place, (row, group, gain) in enumerate(zip(rows, groups, gains, strict=True)):
            row[0] *= gain
            if isinstance(inner := group["inner_lr"], str) or callable(inner):
                row[-1] = self._inner_rate(inner, float(row[0]), workers, self._largest_of(place)[-1])
        return rows.ravel()

    @property
    def has_filters(self) -> bool:
        """Whether filters matter to the displacement or to the rule, so that parameters must be checked for them."""
        return self.projects or self.extrapolation.name == "filter"

    def check_filters(
        self, name: str, shape: Sequence[int], strides: Sequence[int], inner_lr: InnerRate
    ) -> None:
        """Complain if a parameter's filters are needed, for its displacement or its projection, and are not there."""
        displaced = self.extrapolation.name == "filter" and inner_lr != 0
        if displaced and len(shape) < 2:
            raise UsageError(
                f"parameter {name!r} of shape {tuple(shape)} has no filters, which take two dimensions: put it into a "
                "group with inner_lr=0, which is not displaced"
            )
        needed = (displaced or self.projects) and len(shape) > 1 and math.prod(shape) > 0
        if needed and shape[0] > 1 and strides[0] != math.prod(shape[1:]):
            raise UsageError(
                f"the filters of parameter {name!r} do not lie one after the other in memory, as {self._purpose()}: "
                f"its shape is {tuple(shape)} and its strides are {tuple(strides)}; make it contiguous"
            )

    def _purpose(self) -> str:
        return (
            f"rule {self.name!r} needs them to project" if self.projects else "their displacement needs them"
        )

    def has_buffer(self, group: Mapping[str, Any]) -> bool:
        """Whether an engine built for this group can take momentum later: only SGD's does without a buffer."""
        return "dampening" not in self.parameters or self.projects or bool(group.get("momentum"))

    def check_fixed(self, group: Mapping[str, Any], flags: int, slots: bool) -> None:
        """Complain if something changed that is settled when the engine is built."""
        refuse_switches(group, self.name, self.flags)
        if changed := self.flag_bits(group) ^ flags:
            name = self.fixed[(changed & -changed).bit_length() - 1]
            raise UsageError(
                f"{name} cannot change once the engine is built: it is {bool(group[name])} in this group of parameters "
                f"and was {not group[name]} at construction"
            )
        if not slots and group.get("momentum"):
            raise UsageError(
                "the engine was built without momentum and has no buffer for it; build a new one"
            )


def _are_same(values: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return all(map(is_, values, before)) or all(map(_is_same, values, before))


def _is_same(value: Any, before: Any) -> bool:
    """Returns true if a value gives the same number, whatever type it may have been given in."""
    if value is before:
        return True
    if type(value) is not type(before):
        return False
    if isinstance(value, tuple):
        return len(value) == len(before) and all(map(_is_same, value, before))
    return isinstance(value, PLAIN) and bool(value == before)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """UsageError if this is none of the choices."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_max_norm(value: Any) -> None:
    """UsageError if gradients cannot be clipped to this norm."""
    if value is None or (isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0):
        return
    raise UsageError(f"max_grad_norm must be None or a positive number, not {value!r}")


def check_tile(tile: Any) -> None:
    """UsageError if this is neither None nor a number of elements."""
    if tile is None:
        return
    if not isinstance(tile, int) or isinstance(tile, bool) or not 1 <= tile < 2**40:
        raise UsageError(f"tile must be None or a whole number of at least 1, not {tile!r}")


def check_bucket(bucket: Any) -> None:
    """UsageError if this is no number of elements."""
    if not isinstance(bucket, int) or isinstance(bucket, bool) or not 1 <= bucket < 2**40:
        raise UsageError(f"bucket must be a whole number of at least 1, not {bucket!r}")


def _value(group: Mapping[str, Any], name: str) -> Any:
    if not name.startswith("beta"):
        if name in group:
            return group[name]
        raise UsageError(f"the parameter group has no {name!r}")
    try:
        return tuple(group["betas"])[int(name.removeprefix("beta")) - 1]
    except (KeyError, IndexError, TypeError):
        raise UsageError(f"betas must be numbers, {name[4:]} of them at least") from None


def _number(name: str, value: Any) -> float:
    return _checked(name, _finite(name, value))


def _settled(number: float, largest: float) -> float:
    """Zero if the number is negligible beside the largest magnitude that it has had."""
    return 0.0 if abs(number) <= NEGLIGIBLE * largest else number


def _finite(name: str, value: Any) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("torch's rules take no words")
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise UsageError(f"{name} must be finite, not {number}")
    return number


def _checked(name: str, number: float) -> float:
    """The number, if it is in the range of what has this name."""
    if number < 0 and name != "dampening":
        raise UsageError(f"{name} must not be negative, but is {number:g}")
    if name.startswith("beta") and number >= 1:
        raise UsageError(f"betas must be below 1, but one is {number:g}")
    if name == "smoothing" and number >= 1:
        raise UsageError(f"smoothing must be below 1, but is {number:g}")
    if name == "gsnr_floor" and number > 1:
        raise UsageError(f"gsnr_floor must not be above 1, but is {number:g}")
    if name == "gsnr_eps" and number == 0:
        raise UsageError("gsnr_eps must be positive: where gradients do not vary it is all that is left")
    return number
