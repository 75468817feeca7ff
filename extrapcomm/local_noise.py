"""How noisy the workers' gradients are, for the inner rate that follows it."""

import math
from collections.abc import Mapping, Sequence

__all__ = ["LocalNoise"]

KEEP = 0.9  # of the averages, per step


class LocalNoise:
    """The noise of a worker's gradient beside its signal, averaged over steps: what `inner_lr="noise"` goes by.

    With sigma^2 the variance of one worker's gradient and mu^2 the squared norm of the true one, both summed over all
    parameters, the inner rate is lr * min(1, sigma^2 / mu^2). So workers whose gradients are mostly noise displace by
    the whole rate, which averages sharp ripples away and is the larger of the two presets, and never by more, because
    the stable range of rates shrinks by 1 + 2 inner_lr / lr on a quadratic; workers that agree displace little, since
    they would only lose stability. Before the first measurement it is lr/K. This is a heuristic of this library.

    Args:
        workers: K.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._variance = self._square = math.nan

    @property
    def coefficient(self) -> float:
        """The inner rate over lr."""
        if math.isnan(self._variance):
            return 1 / self._workers
        return 1.0 if self._variance >= self._square else self._variance / self._square

    def take(self, sums: Sequence[float]) -> None:
        """Average in a step's sums: for each group the mean gradient's squared norm, and the sum of the workers'.

        A step whose sums are not finite, or all zero, measures nothing.
        """
        mean, spread, n = math.fsum(sums[::2]), math.fsum(sums[1::2]), self._workers
        if not 0 < spread < math.inf:
            return
        variance = max((spread - n * mean) / (n - 1), 0.0)
        square = max(mean - variance / n, 0.0)
        keep = 0.0 if math.isnan(self._variance) else KEEP
        self._variance = variance if keep == 0 else keep * self._variance + (1 - keep) * variance
        self._square = square if keep == 0 else keep * self._square + (1 - keep) * square

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds; empty before the first measurement."""
        return {} if math.isnan(self._variance) else {"variance": self._variance, "square": self._square}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from there."""
        self._variance = float(state.get("variance", math.nan))
        self._square = float(state.get("square", math.nan))
