"""AdaScale on an engine: what a step measures, and what the gain makes of its learning rates."""

import copy
import hashlib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .adascale import AdaScale, Proposal
from .errors import UsageError
from .hyper import INNER_PRESETS, InnerRate, Rule
from .observed import Alike, ObservedCore

__all__ = ["Gain", "Gained", "Gathered"]

Groups = Sequence[MutableMapping[str, Any]]
Options = tuple[NDArray[np.uint8], bool, float, float, bool]
KEY = "adascale"  # of its numbers in an optimizer's state_dict, where torch's optimizers pass over it


@dataclass(frozen=True)
class Gathered:
    """How a step comes by its gradients.

    Attributes:
        gradients: their number: the workers, or the micro-batches of the only one.
        micro_batches: how many each of them is the mean of.
        factor: what makes these means of the gradients as the engine has them, which may be sums.
        spread: for each group, the sum over the gradients of their squared norms, if the engine cannot see them.
    """

    gradients: int
    micro_batches: int = 1
    factor: float = 1.0
    spread: Sequence[float] | None = None


def kind_of(inner: InnerRate) -> int:
    """A number for each way in which an inner rate follows the learning rate."""
    if isinstance(inner, str):
        return 1 + INNER_PRESETS.index(inner)
    return 4 if callable(inner) else 0


class Gain:
    """Takes an engine's steps with an estimator's gains.

    Every rank has an estimator of its own and gives it the same sums, so no gain is ever sent. What could make them
    differ, the number of micro-batches, the scale and the progress so far, is compared with the rest of the step's
    numbers before anything is written.

    Args:
        estimator: of this optimizer or engine alone.
        rule: its rule.
        workers: K.

    Raises:
        UsageError: if it is no AdaScale.
    """

    def __init__(self, estimator: AdaScale, rule: Rule, workers: int) -> None:
        if not isinstance(estimator, AdaScale):
            raise UsageError(f"gain must be None or an extrapcomm.AdaScale, not {estimator!r}")
        self.estimator = estimator
        self._rule = rule
        self._workers = workers

    def require(self, gathered: Gathered, groups: Groups) -> None:
        """Complain if these gradients have no gain; before the step, where all ranks hear of it."""
        self.estimator.require(gathered.gradients, len(groups))

    def step(
        self,
        core: ObservedCore,
        table: NDArray[np.float64],
        groups: Groups,
        gathered: Gathered,
        options: Options,
    ) -> tuple[float | None, bool]:
        """Collective: the engine's step; its norm, and whether it was skipped, which leaves the estimator as it was.

        Args:
            core: the engine.
            table: all groups' numbers, with learning rates that have no gain yet.
            groups: where they come from.
            gathered: how the gradients came about.
            options: the engine's present, fused, divisor, max_norm and skip_nonfinite.
        """
        take = self._with_past_gain if self.estimator.lag else self._with_own_gain
        norm, proposal = take(core, table, groups, gathered, options)
        if proposal is not None:
            self.estimator.commit(proposal)
        return norm, proposal is None

    def _with_own_gain(
        self,
        core: ObservedCore,
        table: NDArray[np.float64],
        groups: Groups,
        gathered: Gathered,
        options: Options,
    ) -> tuple[float | None, Proposal | None]:
        """The engine measures in a first pass and asks for the learning rates of the second."""
        found: list[Proposal] = []

        def revise(agreed: NDArray[np.float64], sums: NDArray[np.float64]) -> NDArray[np.float64]:
            found.append(self._measured(sums, gathered))
            return self._rule.with_gains(agreed, groups, found[0].gains, self._workers)

        observe = _core.Observe.before
        norm, skipped, _ = core.step(
            table, *options, observe=observe, revise=revise, gain=self._alike(gathered, groups)
        )
        return norm, None if skipped else found[0]

    def _with_past_gain(
        self,
        core: ObservedCore,
        table: NDArray[np.float64],
        groups: Groups,
        gathered: Gathered,
        options: Options,
    ) -> tuple[float | None, Proposal | None]:
        """The learning rates are known, so that the engine measures along."""
        gains = self.estimator.gains(gathered.gradients, len(groups), gathered.micro_batches)
        table = self._rule.with_gains(table, groups, gains, self._workers)
        observe = _core.Observe.along
        norm, skipped, sums = core.step(table, *options, observe=observe, gain=self._alike(gathered, groups))
        return norm, None if skipped else self._measured(sums, gathered)

    def _measured(self, sums: Sequence[float] | NDArray[np.float64], gathered: Gathered) -> Proposal:
        mean, spread = (np.reshape(sums, (-1, 2)).T * gathered.factor**2).tolist()
        spread = spread if gathered.spread is None else gathered.spread
        return self.estimator.measure(gathered.gradients, spread, mean, gathered.micro_batches)

    def _alike(self, gathered: Gathered, groups: Groups) -> Alike:
        """What all ranks must have alike, beside the table: how inner rates follow from it is part of that."""
        kinds = 0.0
        for group in groups:
            kinds = (5 * kinds + kind_of(group["inner_lr"])) % 2**50
        return float(gathered.micro_batches), self.estimator.scale or 0.0, self.estimator.progress, kinds

    # -- Checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """What an optimizer's state_dict has beside torch's keys."""
        return {KEY: self.estimator.state_dict()}

    def check(self, state_dict: Mapping[str, Any], groups: int) -> int:
        """A digest of what `load` would take, that must be alike on all ranks; UsageError if it does not fit."""
        if KEY not in state_dict:
            return 0
        trial = copy.copy(self.estimator)
        trial.load_state_dict(state_dict[KEY])
        trial.require(2, groups)
        digest = hashlib.blake2b(repr(trial.state_dict()).encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "little")

    def load(self, state_dict: Mapping[str, Any]) -> bool:
        """Continue from there; from the present numbers if it has none, as that of torch's optimizers.

        Returns:
            True if it had any.
        """
        if KEY not in state_dict:
            return False
        self.estimator.load_state_dict(state_dict[KEY])
        return True


class Gained:
    """What an optimizer or engine with a gain shows of it."""

    _gain: Gain | None

    @property
    def gain(self) -> float:
        """AdaScale's gain of the last step, alike on all ranks; 1 before the first one."""
        return self._estimator.gain

    @property
    def progress(self) -> float:
        """Scale-invariant steps: the sum of all gains, which is the time of the baseline's schedule."""
        return self._estimator.progress

    @property
    def gradient_noise_scale(self) -> float:
        """The variance of a baseline batch's gradient over the squared norm of the true one, in baseline batches."""
        return self._estimator.gradient_noise_scale

    def set_scale(self, scale: float | None) -> None:
        """From the next step on the batch has this many baseline batches; call it on every rank.

        Args:
            scale: see `AdaScale`.

        Raises:
            UsageError: if it is not finite or less than 1.
        """
        self._estimator.set_scale(scale)

    @property
    def _estimator(self) -> AdaScale:
        if self._gain is None:
            raise UsageError("there is no gain: construct it with gain=AdaScale()")
        return self._gain.estimator
