"""Gradient accumulation: how many micro-batches each worker's gradient is the sum of."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UsageError

__all__ = ["MicroBatches"]


class MicroBatches:
    """Counts for each worker the micro-batches beside the last, which needs no announcement.

    Args:
        workers: of this rank.
        how: "mean" or "sum" of them.
    """

    def __init__(self, workers: int, how: str) -> None:
        self._how = how
        self._before_last = [0] * workers
        self._seen: set[int] = set()
        self.open = False

    def reset(self) -> None:
        """All counts start again."""
        self._before_last = [0] * len(self._before_last)

    def saw(self, worker: int) -> None:
        """The user bound this worker."""
        self._seen.add(worker)

    @contextmanager
    def one_more(self, bound: int) -> Iterator[None]:
        """A micro-batch of the workers that are bound within the context, or of the one that is bound anyway."""
        if self.open:
            raise UsageError("no_sync() is already open: leave it after each micro-batch")
        self._seen = set()
        self.open = True
        try:
            yield
        finally:
            self.open = False
        for worker in self._seen or {bound}:
            self._before_last[worker] += 1

    def divisor(self) -> int:
        """What the sum of the micro-batches is divided by.

        Raises:
            UsageError: if the workers have different numbers.
        """
        if len(set(self._before_last)) > 1:
            raise UsageError(
                f"this rank's workers have accumulated {[n + 1 for n in self._before_last]} micro-batches; "
                "all need the same number"
            )
        return 1 + self._before_last[0] if self._how == "mean" else 1
