"""What the sums of a step decide beside its gain: inner rates by noise, and scales that rules revise."""

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .hyper import Rule

__all__ = ["Alike", "ObservedCore", "Rescale"]

Groups = Sequence[MutableMapping[str, Any]]
Numbers = NDArray[np.float64]
Alike = tuple[float, float, float, float]


class Rescale:
    """EG's scale: multiplied at every step by an exponential of how well momentum and gradient agree.

    Source: arXiv:2202.00145, with the exponent kept within [-1, 1].

    Args:
        rule: a rule with `lr_scale` and `scale`, which measures the sum over a group of momentum times gradient.
        groups: their number.
    """

    def __init__(self, rule: Rule, groups: int) -> None:
        names = list(rule.parameters)
        self._rate, self._scale = names.index("lr_scale"), names.index("scale")
        self._groups = groups
        self._revised: list[float] = []

    def __call__(self, table: Numbers, sums: Numbers) -> Numbers:
        """The table with the scales that this step shall take."""
        agreement = float(sums[::2].sum())
        rows = np.array(table).reshape(self._groups, -1)
        for row in rows:
            exponent = float(row[self._rate]) * agreement
            row[self._scale] *= math.exp(min(max(exponent, -1.0), 1.0)) if math.isfinite(exponent) else 1.0
        self._revised = rows[:, self._scale].tolist()
        return rows.ravel()

    def keep(self, groups: Groups) -> None:
        """The step happened; without any gradient it has revised nothing."""
        if not self._revised:
            return
        for group, scale in zip(groups, self._revised, strict=True):
            group["scale"] = scale


@dataclass
class ObservedCore:
    """An engine's step, with what these groups ask to be observed in it.

    Attributes:
        core: the engine.
        rule: its rule.
        groups: the groups of its parameters; a rule may change its own numbers in them.
    """

    core: _core.Engine
    rule: Rule
    groups: Groups

    def step(
        self,
        table: Numbers,
        present: NDArray[np.uint8],
        fused: bool,
        divisor: float,
        max_norm: float,
        skip_nonfinite: bool,
        *,
        observe: _core.Observe = _core.Observe.nothing,
        revise: "_core.Revise | None" = None,
        gain: Alike = (0.0, 0.0, 0.0, 0.0),
    ) -> tuple[float | None, bool, list[float]]:
        """Collective: as the engine's."""
        by_noise = self.rule.follows_noise(self.groups)
        if by_noise and observe == _core.Observe.nothing:
            observe = _core.Observe.along
        rescale = Rescale(self.rule, len(self.groups)) if self.rule.revises else None
        options = (present, fused, divisor, max_norm, skip_nonfinite, observe, revise, gain, rescale)
        norm, skipped, sums = self.core.step(table, *options)
        if not skipped and by_noise:
            self.rule.local_noise.take(sums)
        if not skipped and rescale is not None:
            rescale.keep(self.groups)
        return norm, skipped, sums
