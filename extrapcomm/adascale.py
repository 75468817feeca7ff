"""AdaScale: how much longer a step a larger batch is worth, measured from the gradients that the batch consists of.

The baseline batch is the one whose learning rate is known; a step's batch is S times as large (S is the scale) and
comes as n gradients, for batches of n/S of which the baseline would have been one. Let sigma^2 be the variance of a
baseline batch's gradient (the trace of its covariance) and mu^2 the squared norm of the true gradient. The mean of the
n gradients then has the expected squared norm mu^2 + sigma^2 / S, a baseline batch's gradient mu^2 + sigma^2, and their
ratio is the gain: 1 where all batches say the same and a larger one tells nothing new, S where all is noise. It
multiplies the learning rate, and a step counts as that many baseline steps of the schedule.

Every step samples sigma^2 and mu^2 without bias, from two sums of squares, and clips the samples; the gain is that of
their running averages. A rank that is given the same sums finds the same gain, so nobody has to be told.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

__all__ = ["AdaScale", "Average", "Proposal"]

VAR_FLOOR = 1e-6  # of a sample of sigma^2
WINDOW = 1000  # baseline batches, or gradients, that the averages remember
AVERAGINGS = ("mean", "debiased")


@dataclass(frozen=True)
class Average:
    """Running averages of sigma^2 and mu^2; all zero before the first sample.

    Attributes:
        var: sigma^2 of a baseline batch.
        sqr: mu^2.
        samples: how many there were.
        weight: what an exponential average that began with zero would give to all samples together.
    """

    var: float = 0.0
    sqr: float = 0.0
    samples: int = 0
    weight: float = 0.0

    def gain(self, scale: float) -> float:
        """(var + sqr) / (var / scale + sqr), written such that it is in [1, scale] and no sum overflows."""
        return 1.0 + (scale - 1.0) / (1.0 + self.sqr / self.var * scale) if self.var else 1.0

    def after(self, sample: tuple[float, float], smoothing: float, averaging: str) -> "Average":
        """With one more sample of var and sqr, which counts 1 / samples, 1 - smoothing, or in between."""
        samples = self.samples + 1
        weight = smoothing * self.weight + (1.0 - smoothing)
        newest = max(1.0 / samples, 1.0 - smoothing) if averaging == "mean" else (1.0 - smoothing) / weight
        var = self.var + newest * (sample[0] - self.var)
        sqr = self.sqr + newest * (sample[1] - self.sqr)
        return Average(var, sqr, samples, weight)


@dataclass(frozen=True)
class Proposal:
    """What `AdaScale.measure` found, to be committed once the step has happened.

    Attributes:
        gains: what multiplies each group's learning rate.
        gain: of all groups together; how many baseline steps the step counts.
        averages: with this step's samples.
        before: the averages that it began with.
    """

    gains: tuple[float, ...]
    gain: float
    averages: tuple[Average, ...]
    before: tuple[Average, ...]


class AdaScale:
    """Estimates each step's gain; changes nothing until told that the step has happened.

    The averages belong to the baseline batch. So neither `set_scale` nor another number of gradients touches them, as
    long as a baseline batch is the same number of examples; for another baseline begin with a new estimator.
    (fairscale then multiplies its average of the variance by old scale / new scale. A fixed baseline needs no factor,
    and a new baseline for the same batch needs the inverse.)

    A step whose gradients are all zero, or whose sums are not finite, measures nothing: the averages stay as they are
    and their gain is used, which is 1 before the first sample. Gradients without variance count as var = 1e-6, and
    their gain is close to 1 unless they are as small themselves; a mean that is not longer than the noise explains
    counts as sqr = 0, and the gain of such samples alone is the scale.

    With local extrapolation the gradients are taken at different points, which adds to their variance: to
    1 / (1 - (inner_lr h)^2) times sigma^2 on a quadratic of curvature h, and the gain is a little too large.

    Args:
        scale: batch size in baseline batches, at least 1; None for the number of micro-batches of each step, those of
            all workers, so that the baseline batch is one micro-batch.
        lag: 0 takes each step's own gain, which costs a pass over the gradients before the one that applies them; 1
            takes the gain that the steps before it have measured, and costs none. The first step's is 1 then.
        averaging: "mean" of all samples until the exponential average takes over (the paper), or "debiased", the
            exponential average divided by the weight of its samples (fairscale).
        smoothing: of the exponential average, in [0, 1), where 0 is none; None for max(1 - S / 1000, 0) (the paper),
            which if debiased takes the number of gradients for S (fairscale).
        per_group: whether each group's learning rate has a gain of its own (fairscale's step), and not all that of
            the sums over all groups (the paper). A group that is added later begins with its own first sample;
            without `per_group` the sums just have more terms.

    Attributes:
        gain: the last committed step's, of all groups together; 1 before.
        progress: scale-invariant steps, the sum of these gains: the time of the baseline's learning rate schedule.

    Raises:
        UsageError: for arguments out of range.

    Source: AdaScale SGD: A User-Friendly Algorithm for Distributed Training (arXiv:2007.05105), and its submission to
    ICLR 2020 as "A Scale-Invariant Algorithm for Distributed Training", which tells the estimators; where the number of
    gradients is not the scale, fairscale's fairscale/optim/adascale.py.

    Example:
        >>> from extrapcomm.adascale import AdaScale
        >>> adascale = AdaScale()
        >>> step = adascale.measure(4, spread=[8.0], mean=[1.25])  # of (1, 0), (0, 1), (1, 1), (2, 0)
        >>> step.gains
        (1.6,)
        >>> adascale.commit(step)
        >>> adascale.progress
        1.6
    """

    def __init__(
        self,
        scale: float | None = None,
        *,
        lag: int = 0,
        averaging: str = "mean",
        smoothing: float | None = None,
        per_group: bool = False,
    ) -> None:
        if lag not in (0, 1):
            raise UsageError(f"lag must be 0 or 1, not {lag!r}")
        if averaging not in AVERAGINGS:
            raise UsageError(f"averaging must be one of {', '.join(AVERAGINGS)}, not {averaging!r}")
        if smoothing is not None and not 0 <= _number("smoothing", smoothing) < 1:
            raise UsageError(f"smoothing must be in [0, 1), but is {smoothing}")
        self.set_scale(scale)
        self.lag = int(lag)
        self._averaging = averaging
        self._smoothing = smoothing
        self._per_group = bool(per_group)
        self._averages: tuple[Average, ...] = ()
        self.gain = 1.0
        self.progress = 0.0

    @property
    def scale(self) -> float | None:
        """The batch size in baseline batches; None if it is the number of micro-batches."""
        return self._scale

    def set_scale(self, scale: float | None) -> None:
        """From the next step on the batch has this many baseline batches; the averages remain.

        Args:
            scale: see the class.

        Raises:
            UsageError: if it is not finite or less than 1; nothing has changed then.
        """
        if scale is not None and not 1 <= _number("scale", scale) < math.inf:
            raise UsageError(f"scale must be finite and at least 1, but is {scale}")
        self._scale = None if scale is None else float(scale)

    @property
    def gradient_noise_scale(self) -> float:
        """The average of sigma^2 / that of mu^2, in baseline batches; inf if mu^2 is zero or not yet known.

        Times the examples in a baseline batch it is the simple noise scale of An Empirical Model of Large-Batch
        Training (McCandlish et al., arXiv:1812.06162).
        """
        total = _together(self._averages)
        return total.var / total.sqr if total.sqr else math.inf

    def require(self, gradients: int, groups: int) -> None:
        """Complain if a step with so many gradients and groups of parameters tells nothing.

        Raises:
            UsageError: for fewer than two gradients, or fewer groups than before.
        """
        if gradients < 2:
            raise UsageError(
                "AdaScale needs at least two gradients per step: more workers, or more than one micro-batch (no_sync())"
            )
        if (count := groups if self._per_group else 1) < len(self._averages):
            raise UsageError(f"there were {len(self._averages)} groups at the last step, now {count}")

    def gains(self, gradients: int, groups: int, micro_batches: int = 1) -> tuple[float, ...]:
        """What multiplies each group's learning rate by the averages as they are: a step's with `lag=1`."""
        of_groups, _ = self._gains_of(self._averages, self._scale_of(gradients * micro_batches), groups)
        return of_groups

    def measure(
        self, gradients: int, spread: Sequence[float], mean: Sequence[float], micro_batches: int = 1
    ) -> Proposal:
        """The gains for a step with these gradients; the estimator remains as it is until `commit`.

        Args:
            gradients: their number n, which may differ from step to step. The micro-batches that a worker
                accumulates are one gradient, their mean, unless they are measured one by one.
            spread: for each group, the sum over the n gradients of their squared norms, loss scale and divisor
                taken out.
            mean: for each group, the squared norm of the mean of the n gradients, before it is clipped or decayed.
            micro_batches: how many each of the n gradients is the mean of.

        Raises:
            UsageError: see `require`.
        """
        self.require(gradients, len(spread))
        scale = self._scale_of(gradients * micro_batches)
        sums = list(zip(self._pooled(spread), self._pooled(mean), strict=True))
        samples = [_sample(s, m, gradients, scale) for s, m in sums]
        smoothing = self._smoothing_for(gradients, scale)
        averages = tuple(
            average if sample is None else average.after(sample, smoothing, self._averaging)
            for average, sample in zip(self._extended(len(sums)), samples, strict=True)
        )
        gains, gain = self._gains_of(self._averages if self.lag else averages, scale, len(spread))
        return Proposal(gains, gain, averages, self._averages)

    def commit(self, proposal: Proposal) -> None:
        """The step of this proposal has happened.

        Raises:
            UsageError: if another one, or a loaded state, came between.
        """
        if proposal.before is not self._averages:
            raise UsageError("this proposal was not made from the present averages: measure again")
        self._averages = proposal.averages
        self.gain = proposal.gain
        self.progress += proposal.gain

    def __repr__(self) -> str:
        return (
            f"AdaScale({self._scale}, lag={self.lag}, averaging={self._averaging!r}, smoothing={self._smoothing}, "
            f"per_group={self._per_group})"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was measured, in plain numbers; the arguments, the scale among them, belong to the run and not to it."""
        averages = self._averages
        return {
            "per_group": self._per_group,
            "gain": self.gain,
            "progress": self.progress,
            "var": [a.var for a in averages],
            "sqr": [a.sqr for a in averages],
            "samples": [a.samples for a in averages],
            "weight": [a.weight for a in averages],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            UsageError: if it is none, or was saved with another `per_group`; nothing has changed then.
        """
        try:
            per_group, gain, progress = (state_dict[name] for name in ("per_group", "gain", "progress"))
            columns = [state_dict[name] for name in ("var", "sqr", "samples", "weight")]
            averages = tuple(_loaded(*row) for row in zip(*columns, strict=True))
            gain, progress = _measured(gain), _measured(progress)
        except (KeyError, TypeError, ValueError):
            raise UsageError("this is not the state of an AdaScale estimator") from None
        if per_group != self._per_group:
            raise UsageError(
                f"the state was saved with per_group={per_group}, this estimator has the opposite"
            )
        self._averages, self.gain, self.progress = averages, gain, progress

    def _pooled(self, of_groups: Sequence[float]) -> list[float]:
        """One number for each average that is kept."""
        numbers = [float(number) for number in of_groups]
        return numbers if self._per_group else [sum(numbers)]

    def _extended(self, count: int) -> tuple[Average, ...]:
        """The averages, and empty ones for groups that are new."""
        return self._averages + (Average(),) * (count - len(self._averages))

    def _scale_of(self, micro_batches: int) -> float:
        return float(micro_batches) if self._scale is None else self._scale

    def _gains_of(
        self, averages: tuple[Average, ...], scale: float, groups: int
    ) -> tuple[tuple[float, ...], float]:
        """Each group's gain, and that of all together."""
        shared = _together(averages).gain(scale)
        if not self._per_group:
            return (shared,) * groups, shared
        empty = (Average(),) * (groups - len(averages))
        return tuple(average.gain(scale) for average in averages + empty), shared

    def _smoothing_for(self, gradients: int, scale: float) -> float:
        if self._smoothing is not None:
            return self._smoothing
        return max(1.0 - (scale if self._averaging == "mean" else gradients) / WINDOW, 0.0)


def _sample(spread: float, mean: float, gradients: int, scale: float) -> tuple[float, float] | None:
    """sigma^2 of a baseline batch and mu^2, each clipped; None if these sums tell nothing."""
    var = scale * (spread / gradients - mean) / (gradients - 1)
    sqr = mean - var / scale
    if spread == 0 or not (math.isfinite(var) and math.isfinite(sqr)):
        return None
    return max(var, VAR_FLOOR), max(sqr, 0.0)


def _together(averages: Sequence[Average]) -> Average:
    """The sums over groups."""
    return Average(_total(a.var for a in averages), _total(a.sqr for a in averages))


def _total(numbers: Iterable[float]) -> float:
    """Their sum, or the largest number if that is less: two infinite sums would have no ratio."""
    return min(sum(numbers), sys.float_info.max)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number, not {value!r}") from None


def _measured(value: Any) -> float:
    """A number as the estimator could have saved it; ValueError otherwise."""
    if not 0 <= float(value) < math.inf:
        raise ValueError
    return float(value)


def _loaded(var: Any, sqr: Any, samples: Any, weight: Any) -> Average:
    return Average(_measured(var), _measured(sqr), int(_measured(samples)), _measured(weight))
